"""A look at all VMs of this user, through their windows (window.py)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import HostError, SandboxKernelError
from sandbox_kernel.supervisor.remote import ask, windows
from sandbox_kernel.supervisor.window import SECONDS

_ASKERS = 16


def look_at_all() -> list[dict[str, Any]]:
    """The usage of each of this user's VMs that has a kernel; of one that does not answer, id and `error`."""
    with ThreadPoolExecutor(_ASKERS) as askers:
        return [usage for usage in askers.map(_look_at, windows()) if usage is not None]


def _look_at(window: Path) -> dict[str, Any] | None:
    try:
        usage = ask(window, {"op": "usage"}, SECONDS).get("usage")
        if isinstance(usage, dict):
            return usage
        why = "its supervisor does not tell"
    except HostError:
        return None  # it has just ended
    except SandboxKernelError as error:
        why = str(error)
    return {"id": window.parent.name, "error": why} if window.exists() else None
