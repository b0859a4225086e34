"""The device's end of a split virtqueue (virtio 1.2, 2.7).

Theory of operation. A queue is three arrays in guest memory. The *descriptor table* has a row for each
buffer: address, length, flags, next row. The driver offers a chain of rows by storing the index of its
first row (the *head*) in the *available ring* and then raising that ring's index. The device returns a
chain by storing its head and the bytes written in the *used ring* and then raising that ring's index.

    avail: flags u16 · idx u16 · ring[size] u16            used: flags u16 · idx u16 · ring[size] {u32, u32}

Both indices run freely modulo 2**16. `avail.flags & 1` asks the device for no interrupts; `used.flags & 1`
asks the driver for no kicks. Of virtio's optional features none is offered: no indirect descriptors, no
event index, no packed ring.

Rules that this file keeps:

1. Every descriptor and every ring entry is loaded once; checks and use see the same value.
2. A head or a next outside the table, a chain longer than the table (a loop), a device-readable buffer after
   a device-writable one, an INDIRECT flag, a chain above the byte limit, or an available index more than
   `size` ahead is a `GuestProtocolError`.
3. Used entries are stored before the index that announces them, and a batch is announced by one store.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.virtio.memory import GuestMemory, fence

MAX_SIZE: Final = 1024
"""Largest queue accepted (virtio allows 32768; QEMU's vsock device has 128)."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_AVAILABLE: Final = struct.Struct("<H")
_USED: Final = struct.Struct("<II")
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_NO_KICK: Final = 1


class Chain(NamedTuple):
    """One chain of buffers that the driver offered.

    Attributes:
        head: what `SplitQueue.complete` wants back.
        readable: (guest address, length) of what the device may read, in order, none of them empty.
        writable: the same for what the device may write.
    """

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class SplitQueue:
    """One virtqueue, from the device's side."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        base: int,
        max_chain_bytes: int,
    ) -> None:
        """Check the geometry and begin at `base`.

        Args:
            memory: where the rings and the buffers are.
            size: rows of the table; a power of two up to `MAX_SIZE`.
            descriptors: guest address of the descriptor table, aligned to 16.
            available: guest address of the available ring, aligned to 2.
            used: guest address of the used ring, aligned to 4.
            base: index of the first chain to take; it is also the used index, as no chain is ever in flight.
            max_chain_bytes: most bytes that one chain may have.

        Raises:
            GuestProtocolError: the size, an alignment or an address is not acceptable.
        """
        check_size(size)
        if descriptors % 16 or available % 2 or used % 4:
            raise GuestProtocolError("a virtqueue's rings are not aligned to 16, 2 and 4 bytes")
        for address, length in ((descriptors, 16 * size), (available, 4 + 2 * size), (used, 4 + 8 * size)):
            memory.read(address, length)
        self._memory = memory
        self._size = size
        self._mask = size - 1
        self._table_at = descriptors
        self._available_at = available
        self._used_at = used
        self._max_chain_bytes = max_chain_bytes
        self._next = base & 0xFFFF
        self._offered = self._next
        self._used = self._next
        self._done = bytearray()
        # What the ring says is not known: a queue that is set up anew may have refused kicks before.
        self._flags = -1
        self._table: memoryview | bytes = b""
        self._ring: memoryview | bytes = b""

    @property
    def memory(self) -> GuestMemory:
        """Where this queue's buffers are."""
        return self._memory

    @property
    def base(self) -> int:
        """Index of the next chain to take."""
        return self._next

    def pop(self) -> Chain | None:
        """Take the next chain that the driver offers, None when there is none.

        Raises:
            GuestProtocolError: rule 2 is broken.
        """
        if self._next == self._offered and not self._look():
            return None
        (head,) = _AVAILABLE.unpack_from(self._ring, 2 * (self._next & self._mask))
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        left = self._max_chain_bytes
        index = head
        for _ in range(self._size):
            if index >= self._size:
                raise GuestProtocolError(f"descriptor {index} is outside a virtqueue of {self._size}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(self._table, 16 * index)
            if flags & _INDIRECT:
                raise GuestProtocolError("the guest uses an indirect descriptor, which was not negotiated")
            left -= length
            if left < 0:
                raise GuestProtocolError(f"a descriptor chain is larger than {self._max_chain_bytes} bytes")
            if flags & _WRITE:
                if length:
                    writable.append((address, length))
            elif writable:
                raise GuestProtocolError("a descriptor chain has a readable buffer after a writable one")
            elif length:
                readable.append((address, length))
            if not flags & _NEXT:
                self._next = (self._next + 1) & 0xFFFF
                return Chain(head, readable, writable)
            index = following
        raise GuestProtocolError(f"a descriptor chain is longer than its virtqueue of {self._size}")

    def undo(self) -> None:
        """Put the chain that was popped last back, untouched; `pop` will give it again."""
        self._next = (self._next - 1) & 0xFFFF

    def complete(self, head: int, written: int) -> None:
        """Return a chain to the driver, at the next `publish`.

        Args:
            head: the chain's.
            written: bytes stored in its writable buffers.
        """
        self._done += _USED.pack(head, written)

    def publish(self) -> bool:
        """Let the driver see all completed chains. True when it wants an interrupt for them."""
        if not self._done:
            return False
        count = len(self._done) // 8
        slot = self._used & self._mask
        ring = self._used_at + 4
        until_end = 8 * (self._size - slot)
        self._memory.write(ring + 8 * slot, self._done[:until_end])
        if len(self._done) > until_end:
            self._memory.write(ring, self._done[until_end:])
        self._done.clear()
        self._used = (self._used + count) & 0xFFFF
        self._store_used()
        fence()
        return not self._memory.load16(self._available_at) & _NO_INTERRUPT

    def refuse_kicks(self) -> None:
        """Ask the driver not to kick when it offers chains: the device looks by itself."""
        if self._flags != _NO_KICK:
            self._flags = _NO_KICK
            self._store_used()

    def accept_kicks(self) -> bool:
        """Ask the driver to kick from now on. True when it has offered chains meanwhile."""
        if self._flags != 0:
            self._flags = 0
            self._store_used()
            fence()
        return self._next != self._offered or self._look()

    def _store_used(self) -> None:
        flags = self._flags if self._flags > 0 else 0
        self._memory.store32(self._used_at, flags | self._used << 16)

    def _look(self) -> bool:
        """Read how far the driver has come."""
        offered = self._memory.load16(self._available_at + 2)
        if offered == self._next:
            return False
        # Chains that are done but not published are still the device's: no driver has their places to offer.
        if (offered - self._next) & 0xFFFF > self._size - ((self._next - self._used) & 0xFFFF):
            raise GuestProtocolError(f"an available index jumps by more than its virtqueue of {self._size}")
        self._offered = offered
        self._ring = self._memory.read(self._available_at + 4, 2 * self._size)
        self._table = self._memory.read(self._table_at, 16 * self._size)
        return True


def check_size(size: int) -> None:
    """Refuse a size that no queue may have.

    Raises:
        GuestProtocolError: not a power of two from 1 to `MAX_SIZE`.
    """
    if not 0 < size <= MAX_SIZE or size & (size - 1):
        raise GuestProtocolError(f"a virtqueue of {size} is not a power of two from 1 to {MAX_SIZE}")
