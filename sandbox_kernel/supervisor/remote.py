"""Asks a VM of this user for something, from outside its client, through its window (window.py)."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sandbox_kernel import paths
from sandbox_kernel.errors import ConfigurationError, GuestError, HostError
from sandbox_kernel.supervisor.control import from_line, raise_failure, to_line
from sandbox_kernel.supervisor.window import PATIENCE, SOCKET

_MOST = 1 << 20


def windows() -> list[Path]:
    """The windows of all VMs of this user that have a kernel, each in a folder with the VM's name."""
    return sorted(paths.runtime_dir().glob(f"*/{SOCKET}"))


def find(vm: str) -> Path:
    """The window of the VM whose name begins with `vm`; with an empty one that of the only VM there is.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    found = [window for window in windows() if window.parent.name.startswith(vm)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(window.parent.name for window in found)
    if found:
        raise ConfigurationError(f"There is more than one VM {vm!r}…: {names}; write more of its name.")
    raise ConfigurationError(f"There is no VM {vm!r}; `sandbox-kernel ps` shows those there are.")


def ask(window: Path, request: Mapping[str, Any], timeout: float = PATIENCE) -> dict[str, Any]:
    """What a VM answers.

    Args:
        window: from `windows` or `find`.
        request: `op` and what belongs to it.
        timeout: seconds that nothing may come.

    Raises:
        SandboxKernelError: what the VM has against it; HostError: it has just ended; GuestError: it does not
            answer.
    """
    answer, connection = _ask(window, request, timeout)
    if connection is not None:
        connection.close()
    return answer


def ask_for_connection(window: Path, request: Mapping[str, Any], timeout: float = PATIENCE) -> socket.socket:
    """The connection that a VM's answer consists of; otherwise as `ask`."""
    _, connection = _ask(window, request, timeout)
    if connection is None:
        raise GuestError(f"The supervisor of {window.parent.name} sent no connection; restart its kernel.")
    return connection


def _ask(
    window: Path, request: Mapping[str, Any], timeout: float
) -> tuple[dict[str, Any], socket.socket | None]:
    text, given = b"", ExitStack()
    handed: socket.socket | None = None
    try:
        with given, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(window))
            connection.sendall(to_line(request))
            while not text.endswith(b"\n") and len(text) < _MOST:
                data, fds, _, _ = socket.recv_fds(connection, 65536, 1, socket.MSG_CMSG_CLOEXEC)
                for fd in fds:
                    handed = given.enter_context(socket.socket(fileno=fd))
                if not data:
                    raise GuestError(f"The supervisor of {window.parent.name} hung up; its log may tell why.")
                text += data
            answer = from_line(text)
            raise_failure(answer)
            given.pop_all()
            return answer, handed
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise HostError(f"The VM {window.parent.name} has ended; start a kernel.") from error
    except OSError as error:
        raise GuestError(f"The supervisor of {window.parent.name} does not answer ({error}).") from error
