"""vsock without the host's kernel: a vhost-user device in this process, served by the event loop.

Theory of operation. QEMU gets one end of a socketpair and speaks vhost-user on it; the other end is read
here. Two file descriptors are watched: that socket, for messages, and the device's epoll, for everything
else. Each callback does a bounded amount of work and asks to be called again when there is more.

QEMU's command line, with N the number of `qemu_socket()` as QEMU inherits it:

    -object memory-backend-memfd,id=ram,size=…,share=on,seal=on -machine …,memory-backend=ram
    -chardev socket,id=vsock,fd=N -device vhost-user-vsock-pci,chardev=vsock

Rules that this file keeps:

1. What the guest or QEMU did wrong ends here: one logged line, `failed` resolved, everything closed.
2. When QEMU closes its end, all streams are closed and connections are refused; that is no failure.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.backend import Backend, MemoryOpener
from sandbox_kernel.vhost_user.channel import Channel
from sandbox_kernel.vhost_user.ring import Ring
from sandbox_kernel.virtio.memory import MappedMemory, ProcessMemory
from sandbox_kernel.vsock.device import MAX_CHAIN, RECEIVE_QUEUE, TRANSMIT_QUEUE, Device
from sandbox_kernel.vsock.muxer import Limits, Muxer

_log = logging.getLogger(__name__)

_MESSAGES: Final = 16
"""vhost-user messages handled in one callback."""


class UserspaceVsock:
    """The host's end of one VM's vsock as a vhost-user device; see `vsock.host.VsockHost`."""

    def __init__(
        self,
        cid: int,
        *,
        limits: Limits | None = None,
        open_memory: MemoryOpener = MappedMemory,
        connection: socket.socket | None = None,
    ) -> None:
        """Begin to serve, in the running event loop.

        Args:
            cid: the guest's context id, from 3 to 2**32 - 2. Any will do: it is known in this VM alone.
            limits: what the guest's streams may cost; the defaults when None. open_memory: how guest memory
            is reached; see also `reach_memory_of`. connection: our end of a socketpair whose other end QEMU
            has; when None, `qemu_socket` is the other
                end of a new one.

        Raises:
            ValueError: the cid is reserved or not a 32-bit number.
        """
        if not 2 < cid < (1 << 32) - 1:
            raise ValueError(f"a guest's CID is from 3 to 2**32 - 2, not {cid}")
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[GuestProtocolError] = self._loop.create_future()
        self._open_memory = open_memory
        self._theirs: socket.socket | None = None
        if connection is None:
            connection, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = Channel(connection)
        self._device = Device(Muxer(cid, limits))
        rings = [Ring(RECEIVE_QUEUE, MAX_CHAIN), Ring(TRANSMIT_QUEUE, MAX_CHAIN)]
        config = cid.to_bytes(8, "little")
        self._backend = Backend(
            config, rings, self._device, lambda regions, files: self._open_memory(regions, files)
        )
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._channel.fileno(), self._serve)
        self._loop.add_reader(self._device.fileno(), self._turn)

    @property
    def failed(self) -> asyncio.Future[GuestProtocolError]:
        """See `VsockHost.failed`."""
        return self._failed

    def qemu_socket(self) -> socket.socket:
        """The end of the vhost-user connection that QEMU inherits.

        It is made non-inheritable; pass its number by `pass_fds`. Close it once QEMU runs, so that the end of
        QEMU is the end of the connection.
        """
        assert self._theirs is not None, "the connection was given"
        return self._theirs

    def reach_memory_of(self, pid: int) -> None:
        """Reach guest memory through `/proc/PID/mem` of QEMU, as a copy-on-write restored VM needs.

        To be called before the device appears in the guest.

        Args:
            pid: QEMU's process id in this process's pid namespace; a child that we may trace.
        """
        self._open_memory = lambda regions, files: ProcessMemory(regions, pid)

    async def connect(self, port: int, timeout: float) -> socket.socket:
        """See `VsockHost.connect`."""
        _check_port(port)
        answer: asyncio.Future[bool] = self._loop.create_future()

        def settle(accepted: bool) -> None:
            if not answer.done():
                answer.set_result(accepted)

        local, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        local.setblocking(False)
        try:
            stream = self._device.open(port, far, settle)
        except BaseException:
            local.close()
            far.close()
            raise
        self._schedule()
        try:
            async with asyncio.timeout(timeout):
                accepted = await answer
        except BaseException as error:
            local.close()
            if not self._closed:
                self._device.abort(stream)
                self._schedule()
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    f"no answer from the guest on vsock port {port} in {timeout:g} s"
                ) from None
            raise
        if not accepted:
            local.close()
            raise ConnectionRefusedError(f"the guest refused a connection to vsock port {port}")
        return local

    def stream_count(self) -> int:
        """Open streams, those that wait for the guest's answer included."""
        return len(self._device)

    async def aclose(self) -> None:
        """See `VsockHost.aclose`."""
        self._close()

    def _serve(self) -> None:
        """Handle what QEMU asks."""
        try:
            for _ in range(_MESSAGES):
                message = self._channel.receive()
                if message is None:
                    break
                answer = self._backend.handle(message)
                if answer is not None:
                    self._channel.send(answer)
                if self._channel.ended:
                    break
        except GuestProtocolError as error:
            self._fail(error)
            return
        if self._channel.ended:
            self._close()
        else:
            self._schedule()

    def _turn(self) -> None:
        """Let the device do what is due."""
        try:
            more = self._device.turn()
        except GuestProtocolError as error:
            self._fail(error)
            return
        if more:
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        if not self._closed:
            self._turn()

    def _fail(self, error: GuestProtocolError) -> None:
        # The frames of a traceback would keep the guest's memory mapped for as long as the error is kept.
        error = GuestProtocolError(str(error))
        _log.error("the guest broke the vsock protocol and its VM must end: %s", error)
        self._close()
        if not self._failed.done():
            self._failed.set_result(error)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_reader(self._device.fileno())
        self._backend.close()
        self._device.close()
        self._channel.close()
        if self._theirs is not None:
            self._theirs.close()


def _check_port(port: int) -> None:
    if not 0 <= port < (1 << 32) - 1:
        raise ValueError(f"a vsock port is from 0 to 2**32 - 2, not {port}")
