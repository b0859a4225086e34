"""vsock by the host's kernel: `/dev/vhost-vsock` and `socket.AF_VSOCK`.

Theory of operation. QEMU is given `-device vhost-vsock-pci,guest-cid=CID`, and the kernel moves the packets.
A stream to the guest is an AF_VSOCK socket. The CID is known to the whole host: two VMs may not have the
same one.

Rule: nothing here connects unless `reservation.unavailable` has said None. Without vhost-vsock a kernel that
is a guest itself sends connections to its own hypervisor, whatever the CID.
"""

from __future__ import annotations

import asyncio
import errno
import math
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from sandbox_kernel.errors import GuestProtocolError

_CONNECT_TIMEOUT: Final = 6
"""SO_VM_SOCKETS_CONNECT_TIMEOUT of linux/vm_sockets.h, which Python has no name for."""
_REFUSALS: Final = {errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENODEV}
"""What connect says when nobody listens, the guest's driver is not up, or there is no such guest."""


def set_connect_timeout(sock: socket.socket, timeout: float) -> None:
    """Let the kernel wait longer for a guest's answer than `timeout` seconds; by itself it would wait 2 s.

    Python takes no structure for an option of an AF_VSOCK socket, so the option is set through an object that
    calls the same socket by another family.
    """
    alias = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.fileno())
    try:
        limit = struct.pack("@ll", math.ceil(timeout) + 1, 0)
        alias.setsockopt(socket.AF_VSOCK, _CONNECT_TIMEOUT, limit)
    finally:
        alias.detach()


class KernelVsock:
    """The host's end of one VM's vsock through the kernel; see `vsock.host.VsockHost`."""

    def __init__(
        self,
        cid: int,
        *,
        family: int = socket.AF_VSOCK,
        address: Callable[[int], Any] | None = None,
    ) -> None:
        """Args: cid is the guest's; family and address (of a port) take another network's place in tests."""
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[GuestProtocolError] = self._loop.create_future()
        self._family = family
        self._address = address or (lambda port: (cid, port))
        self._closed = False

    @property
    def failed(self) -> asyncio.Future[GuestProtocolError]:
        """See `VsockHost.failed`; never resolved, the kernel deals with guests that break the protocol."""
        return self._failed

    async def connect(self, port: int, timeout: float) -> socket.socket:
        """See `VsockHost.connect`."""
        if self._closed:
            raise ConnectionRefusedError(f"the VM ended, vsock port {port} cannot be reached")
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        sock.setblocking(False)
        if self._family == socket.AF_VSOCK:
            set_connect_timeout(sock, timeout)
        try:
            async with asyncio.timeout(timeout):
                await self._loop.sock_connect(sock, self._address(port))
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    f"no answer from the guest on vsock port {port} in {timeout:g} s"
                ) from None
            if isinstance(error, OSError) and error.errno in _REFUSALS:
                raise ConnectionRefusedError(f"the guest refused a connection to vsock port {port}") from None
            raise
        return sock

    async def aclose(self) -> None:
        """See `VsockHost.aclose`; sockets that `connect` returned end with their owners or the guest."""
        self._closed = True
