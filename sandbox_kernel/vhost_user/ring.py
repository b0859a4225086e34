"""One virtqueue as a vhost-user front-end sets it up, piece by piece.

Theory of operation. Size, addresses, base, kick and call arrive in messages of their own, in no fixed order.
A ring runs, that is, it has a `queue`, from when all of it is known, its kick has arrived and it is enabled,
until the front-end stops it by GET_VRING_BASE, which tells how far the device came. A ring that begins again
where it stopped belongs to the same driver (the VM was paused); one that begins elsewhere is `fresh`.

Kick and call are eventfds that the front-end made. A kick is waited for by edge-triggered epoll and never
read: each write is an edge, and a read might block if the front-end plays with the file's flags.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path
from typing import Final

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.protocol import RingAddresses
from sandbox_kernel.virtio.memory import GuestMemory
from sandbox_kernel.virtio.queue import SplitQueue, check_size

_EVENTFD: Final = "anon_inode:[eventfd]"
"""What /proc calls an eventfd. Files with a path begin with a slash, whatever their owner has named them."""


class Ring:
    """The set-up of one virtqueue; `queue` is there while it runs."""

    def __init__(self, index: int, max_chain_bytes: int) -> None:
        """Args: index is the queue's number; a chain of it may have at most max_chain_bytes."""
        self.index = index
        self.queue: SplitQueue | None = None
        self.kick = -1
        """The eventfd by which the driver says that it offered chains, or -1."""
        self.fresh = True
        """True until `started`: a new driver begins, or the first one."""
        self._max_chain_bytes = max_chain_bytes
        self._call = -1
        self._size = 0
        self._base = 0
        self._addresses: RingAddresses | None = None
        self._kicked = False
        self._enabled = False

    def set_size(self, size: int) -> None:
        """SET_VRING_NUM."""
        self._require_stopped("size")
        check_size(size)
        self._size = size

    def set_base(self, base: int) -> None:
        """SET_VRING_BASE."""
        self._require_stopped("base")
        if base > 0xFFFF:
            raise GuestProtocolError(f"a virtqueue's base of {base} is above 65535")
        self.fresh = self.fresh or base != self._base
        self._base = base

    def set_addresses(self, addresses: RingAddresses) -> None:
        """SET_VRING_ADDR; a running ring goes on at the new place."""
        self.halt()
        self._addresses = addresses

    def set_kick(self, file: int) -> None:
        """SET_VRING_KICK: takes `file` (-1 for none) and lets the ring start."""
        self.kick = _replace(self.kick, file)
        self._kicked = True

    def set_call(self, file: int) -> None:
        """SET_VRING_CALL: takes `file` (-1 for none)."""
        self._call = _replace(self._call, file)

    def enable(self, enabled: bool) -> None:
        """SET_VRING_ENABLE, or the default when protocol features were not negotiated."""
        self._enabled = enabled
        if not enabled:
            self.halt()

    def run(self, memory: GuestMemory | None) -> bool:
        """Make the queue if everything that it needs is there and it does not run yet; True when made."""
        if self.queue or not (self._kicked and self._enabled and self._size and self._addresses and memory):
            return False
        size, addresses = self._size, self._addresses
        self.queue = SplitQueue(
            memory,
            size=size,
            descriptors=memory.guest_address(addresses.descriptors, 16 * size),
            available=memory.guest_address(addresses.available, 4 + 2 * size),
            used=memory.guest_address(addresses.used, 4 + 8 * size),
            base=self._base,
            max_chain_bytes=self._max_chain_bytes,
        )
        return True

    def halt(self) -> None:
        """Drop the queue and remember how far it came; `run` may make it again."""
        if self.queue is not None:
            self._base = self.queue.base
            self.queue = None

    def stop(self) -> int:
        """GET_VRING_BASE: halt until the next kick arrives; the index of the next chain."""
        self.halt()
        self.kick = _replace(self.kick, -1)
        self._kicked = False
        return self._base

    def interrupt(self) -> None:
        """Tell the driver that chains were returned."""
        if self._call < 0:
            return
        # The front-end shares the file, may have cleared O_NONBLOCK and filled the counter; a write that
        # waits for it would wait for ever. (It may still do so between these two lines: see SECURITY.md.)
        room = select.poll()
        room.register(self._call, select.POLLOUT)
        if room.poll(0):
            with suppress(BlockingIOError):
                os.eventfd_write(self._call, 1)

    def close(self) -> None:
        """Close what is held, without touching the guest's memory any more. Idempotent."""
        self.queue = None
        self.kick = _replace(self.kick, -1)
        self._call = _replace(self._call, -1)

    def _require_stopped(self, what: str) -> None:
        if self.queue is not None:
            raise GuestProtocolError(f"the {what} of virtqueue {self.index} is set while it runs")


def _replace(old: int, new: int) -> int:
    """Close `old` once `new` is known to be an eventfd and cannot block; otherwise close `new`."""
    if new >= 0:
        try:
            if str(Path(f"/proc/self/fd/{new}").readlink()) != _EVENTFD:
                raise GuestProtocolError("a virtqueue's kick or call is not an eventfd")
            os.set_blocking(new, False)
        except BaseException:
            os.close(new)
            raise
    if old >= 0:
        os.close(old)
    return new
