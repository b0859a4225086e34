"""What the rest of the supervisor knows of vsock: streams from the host to one guest's ports.

Theory of operation. Connections go one way, from the host to the guest. `connect` is for a caller in this
process that wants a socket; `splice` is for one that already has one end of a local socket in other hands
(libzmq's, for instance) and wants it joined to a guest's port. Two implementations keep this promise, and a
guest cannot tell which: `sandbox_kernel.vsock.userspace` and `sandbox_kernel.vsock.kernel`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from sandbox_kernel.errors import GuestProtocolError


class VsockHost(Protocol):
    """The host's end of one VM's vsock. Every method is to be called in the event loop's thread."""

    async def connect(self, port: int, timeout: float) -> socket.socket:
        """Open a stream to a port of the guest.

        Args:
            port: the guest's port, 0 to 2**32 - 2.
            timeout: seconds until the guest must have answered.

        Returns:
            A connected, non-blocking stream socket. It is the caller's to close.

        Raises:
            ConnectionRefusedError: nobody listens there, the guest's driver is not up yet, or the VM ended.
            TimeoutError: the guest has not answered in time.
        """
        ...

    def splice(self, port: int, sock: socket.socket) -> None:
        """Join a connected local stream socket to a new stream to a port of the guest.

        The socket belongs to the device from now on, which closes it when the stream has ended or is
        refused. A half-close of one side reaches the other; bytes sent before a close still arrive.

        Args:
            port: the guest's port, 0 to 2**32 - 2.
            sock: a stream socket; what was sent to it before is not lost.
        """
        ...

    @property
    def failed(self) -> asyncio.Future[GuestProtocolError]:
        """Resolved with the error when the guest broke the protocol and its VM must end.

        It was logged in one line, and all streams are closed.
        """
        ...

    def stream_count(self) -> int:
        """Open streams, those that wait for the guest's answer included."""
        ...

    async def aclose(self) -> None:
        """Close all streams and let go of the guest. Idempotent."""
        ...
