"""Where libzmq meets vsock: one Unix socket per channel, each connection spliced onto a stream of its own.

libzmq can connect to a Unix socket but not to a userspace vsock device. So the relay's guest-facing sockets
connect to the listeners made here, inside the VM's 0700 folder, and each accepted connection is handed to the
vsock host, which carries it to the channel's port in the guest.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path

from sandbox_kernel.vsock.host import VsockHost


class ChannelListeners:
    """The listeners of one VM's channels."""

    def __init__(self, folder: Path, ports: Mapping[str, int], vsock: VsockHost) -> None:
        """Listens for each channel in `ports` (channel to vsock port), in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._vsock = vsock
        self._listeners: dict[socket.socket, Path] = {}
        self.addresses: dict[str, str] = {}
        """ZMQ address to connect to, by channel."""
        for channel, port in ports.items():
            path = folder / f"guest-{channel}"
            listener = socket.socket(socket.AF_UNIX)
            self._listeners[listener] = path
            listener.setblocking(False)
            listener.bind(str(path))
            listener.listen(4)
            self._loop.add_reader(listener, self._accept, listener, port)
            self.addresses[channel] = f"ipc://{path}"

    def close(self) -> None:
        """Closes the listeners and removes their sockets; streams go on. Idempotent."""
        for listener, path in self._listeners.items():
            self._loop.remove_reader(listener)
            listener.close()
            path.unlink(missing_ok=True)
        self._listeners.clear()

    def _accept(self, listener: socket.socket, port: int) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        connection.setblocking(False)
        self._vsock.splice(port, connection)
