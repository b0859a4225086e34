"""What the rest of the supervisor knows of vsock: streams from the host to one guest's ports.

Theory of operation. Connections go one way, from the host to the guest. Two implementations keep this
promise, and a guest cannot tell which: `sandbox_kernel.vsock.userspace` and `sandbox_kernel.vsock.kernel`.
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
            A connected, non-blocking stream socket. It is the caller's to close. A half-close of one side
            reaches the other; bytes sent before a close still arrive.

        Raises:
            ConnectionRefusedError: nobody listens there, the guest's driver is not up yet, or the VM ended.
            TimeoutError: the guest has not answered in time.
        """
        ...

    @property
    def failed(self) -> asyncio.Future[GuestProtocolError]:
        """Resolved with the error when the guest broke the protocol and its VM must end.

        It was logged in one line, and all streams are closed.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the guest: nothing connects any more. Idempotent."""
        ...
