"""A look at all VMs of this user, through their windows (window.py)."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sandbox_kernel import paths
from sandbox_kernel.errors import GuestError, SandboxKernelError
from sandbox_kernel.supervisor.control import from_line, to_line
from sandbox_kernel.supervisor.window import SECONDS, SOCKET

_MOST = 1 << 20
_ASKERS = 16


def look_at_all() -> list[dict[str, Any]]:
    """The usage of each of this user's VMs that has a kernel; of one that does not answer, id and `error`."""
    windows = sorted(paths.runtime_dir().glob(f"*/{SOCKET}"))
    with ThreadPoolExecutor(_ASKERS) as askers:
        return [usage for usage in askers.map(_look_at, windows) if usage is not None]


def _look_at(window: Path) -> dict[str, Any] | None:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(window))
            connection.sendall(to_line({"op": "usage"}))
            text = b""
            while not text.endswith(b"\n") and len(text) < _MOST:
                data = connection.recv(65536)
                if not data:
                    raise GuestError("its supervisor hung up")
                text += data
        usage = from_line(text).get("usage")
        if isinstance(usage, dict):
            return usage
        raise GuestError("its supervisor does not tell")
    except (FileNotFoundError, ConnectionRefusedError):
        return None  # it has just ended
    except (OSError, SandboxKernelError) as error:
        return {"id": window.parent.name, "error": str(error)} if window.exists() else None
