"""Where the host listens for a port of a guest: its loopback, or a Unix socket; never anything else.

    port    127.0.0.1, and ::1 with the same number where the host has IPv6
    path    a socket of mode 0600; one that a killed process has left there is replaced, nothing else is

The file of a Unix socket is removed by whoever has made it, or after a SIGKILL by who is told of it
(`Listener.socket`); where that is killed, too, it stays, with nobody behind it, until it is replaced.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.exposure import Exposure

BACKLOG = 64
"""Connections that wait to be accepted."""
_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
_ATTEMPTS = 16
"""Ports that are tried where the system chooses and somebody else has the same one on ::1."""
_LOOK = 1.0


class Listener:
    """The sockets of one exposure, bound and listening."""

    def __init__(self, exposure: Exposure) -> None:
        """Listens from now on; who connects waits.

        Raises:
            ConfigurationError: the address is taken, or not to be had.
        """
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.sockets = _at_path(exposure, stack) if exposure.path else _on_loopback(exposure, stack)
            self.exposure = exposure if exposure.path else exposure.at(self.sockets[0].getsockname()[1])
            """What it was made for, with the port that the system has chosen."""
            status = Path(exposure.path).lstat() if exposure.path else None
            self.socket = f"{status.st_dev}:{status.st_ino} {exposure.path}" if status else ""
            """Which Unix socket it has, `DEVICE:INODE PATH`; empty for none."""
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Listens no more; idempotent."""
        self._stack.close()


def is_free(port: int) -> bool:
    """Whether the loopback's `port` could be listened on just now."""
    try:
        Listener(Exposure(1, port)).close()
    except ConfigurationError:
        return False
    return True


def _on_loopback(exposure: Exposure, stack: ExitStack) -> list[socket.socket]:
    assert exposure.port is not None
    attempts = 1 if exposure.port else _ATTEMPTS
    for attempt in range(1, attempts + 1):
        with ExitStack() as trying:
            try:
                first = trying.enter_context(_listen(socket.AF_INET, "127.0.0.1", exposure.port))
                sockets = [first]
                try:
                    second = _listen(socket.AF_INET6, "::1", first.getsockname()[1])
                    sockets.append(trying.enter_context(second))
                except OSError as error:
                    if error.errno not in _NO_IPV6:
                        raise
            except OSError as error:
                if error.errno == errno.EADDRINUSE and attempt < attempts:
                    continue
                raise _refusal(exposure, error) from error
            stack.push(trying.pop_all())
            return sockets
    raise AssertionError("the last attempt returns or raises")


def _listen(family: int, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # over what a restarted kernel has closed
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _at_path(exposure: Exposure, stack: ExitStack) -> list[socket.socket]:
    path = Path(exposure.path)
    made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    made.setblocking(False)
    try:
        if _is_stale(path):
            path.unlink()
        made.bind(exposure.path)
        stack.callback(_remove, path, path.lstat())
        path.chmod(0o600)  # nobody connects before it listens
        made.listen(BACKLOG)
    except OSError as error:
        raise _refusal(exposure, error) from error
    return [made]


def _is_stale(path: Path) -> bool:
    """Whether there is a Unix socket with nobody behind it; what else is there makes `bind` fail."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_LOOK)
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # not there, or somebody is busy behind it
    return False


def _remove(path: Path, ours: os.stat_result) -> None:
    """Removes the socket, unless it is another one by now."""
    with suppress(OSError):
        there = path.lstat()
        if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
            path.unlink()


def _refusal(exposure: Exposure, error: OSError) -> ConfigurationError:
    if exposure.path:
        if error.errno == errno.EADDRINUSE:
            return ConfigurationError(
                f"Port {exposure.guest} of the VM cannot be exposed at {exposure.path}, as something is "
                "there already; remove it, or choose another path in `expose`."
            )
        what, fix = exposure.path, "another path"
    elif error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"Port {exposure.guest} of the VM cannot be exposed at port {exposure.port} of this host, as "
            "somebody listens there already; choose another one in `expose`, or none for any that is free."
        )
    else:
        what, fix = f"port {exposure.port} of this host", "another one"
    return ConfigurationError(
        f"Port {exposure.guest} of the VM cannot be exposed at {what} ({error.strerror}); choose {fix} in "
        "`expose`."
    )
