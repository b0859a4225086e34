"""A guest's memory, as the table of a vhost-user front-end describes it.

Theory of operation. The front-end (QEMU) names up to eight regions, each with the guest-physical address at
which the guest sees it, the address at which QEMU sees it, its size, and a file with an offset. There are
two ways to the bytes:

* `MappedMemory` maps the file. Reads and writes are slices of a memoryview; nothing is copied. It is right
  when QEMU maps the file shared (`memory-backend-memfd,share=on,seal=on`).
* `ProcessMemory` goes through `/proc/PID/mem` at the address at which QEMU sees a region. It is right when
  QEMU maps the file privately (a VM restored copy-on-write): the guest's own pages are then in no file.

Rules that this file keeps:

1. An address comes from the guest. Every access names an address and a length, lies in exactly one region,
   and never crosses its end. Anything else is a `GuestProtocolError`.
2. A mapped file cannot become shorter than its mapping: it must be sealed against shrinking, because a
   touch beyond its end would be a SIGBUS for the whole supervisor.
3. 16- and 32-bit loads and stores of ring indices are single machine accesses on the mapping; through
   /proc they are made safe against tearing (see `ProcessMemory`).

Memory ordering. The guest runs at the same time on another CPU. Hosts are x86-64, where loads are not
reordered with loads nor stores with stores, and the interpreter executes accesses in program order. The
one order that x86 does not keep, a store followed by a load of another place, is what `fence` is for.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sandbox_kernel.errors import GuestProtocolError

MAX_REGIONS = 8
"""Regions in one memory table (vhost-user, "Memory regions description" without CONFIGURE_MEM_SLOTS)."""

_ADDRESS_SPACE = 1 << 64
_LOCK = threading.Lock()
_LOADS = 4


@dataclass(frozen=True)
class Region:
    """One row of the memory table (vhost-user, "Memory regions description").

    Attributes:
        guest_address: where the guest's physical address space has it.
        size: bytes.
        user_address: where the front-end's own address space has it.
        file_offset: where it begins in the file that came with the row.

    Raises:
        GuestProtocolError: the row is empty or leaves the 64-bit address space.
    """

    guest_address: int
    size: int
    user_address: int
    file_offset: int

    def __post_init__(self) -> None:
        last = _ADDRESS_SPACE - self.size
        if self.size <= 0 or max(self.guest_address, self.user_address, self.file_offset) > last:
            raise GuestProtocolError(
                f"a memory region of {self.size} bytes at guest address {self.guest_address:#x} is empty or "
                "leaves the 64-bit address space"
            )


class GuestMemory(Protocol):
    """Checked access to a guest's memory. Addresses are guest-physical, lengths are bytes.

    Every method raises `GuestProtocolError` when the bytes do not lie within one region.
    """

    def read(self, address: int, length: int) -> memoryview | bytes:
        """The bytes there: live (a view of the guest's memory) or a copy, whichever costs less."""
        ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` there."""
        ...

    def borrow(self, address: int, length: int) -> memoryview:
        """A buffer to fill in the place of guest memory; valid until the next call of `borrow`.

        What was filled reaches the guest at the latest with `commit`.
        """
        ...

    def commit(self, address: int, filled: memoryview) -> None:
        """Bring what was filled of a borrowed buffer (its first bytes) to the guest."""
        ...

    def load16(self, address: int) -> int:
        """Load an aligned little-endian 16-bit value that the guest may be changing right now."""
        ...

    def store32(self, address: int, value: int) -> None:
        """Store an aligned little-endian 32-bit value so that the guest sees the old or the new one."""
        ...

    def guest_address(self, user_address: int, length: int) -> int:
        """Translate an address of the front-end's own address space, as ring addresses are given."""
        ...

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        ...


def fence() -> None:
    """Order all stores before it before all loads after it, as seen by the guest.

    Taking a free lock is an atomic read-modify-write, which on x86-64 is a full memory barrier.
    """
    with _LOCK:
        pass


def _outside(address: int, length: int) -> GuestProtocolError:
    return GuestProtocolError(
        f"the guest named {length} bytes at {address:#x}, which are not within one region of its memory"
    )


def _check_table(regions: Sequence[Region]) -> None:
    if not 0 < len(regions) <= MAX_REGIONS:
        raise GuestProtocolError(f"a memory table has {len(regions)} regions, 1 to {MAX_REGIONS} are allowed")
    ordered = sorted(regions, key=lambda region: region.guest_address)
    for low, high in itertools.pairwise(ordered):
        if low.guest_address + low.size > high.guest_address:
            raise GuestProtocolError(f"memory regions overlap at guest address {high.guest_address:#x}")


def _translate(regions: Sequence[Region], user_address: int, length: int) -> int:
    for region in regions:
        offset = user_address - region.user_address
        if 0 <= offset < region.size:
            if length > region.size - offset:
                break
            return region.guest_address + offset
    raise _outside(user_address, length)


class MappedMemory:
    """A guest's memory through shared mappings of the front-end's files; see `GuestMemory`."""

    def __init__(self, regions: Sequence[Region], files: Sequence[int]) -> None:
        """Map each region from its file.

        Args:
            regions: the memory table.
            files: one file descriptor a region; they stay the caller's and may be closed afterwards.

        Raises:
            GuestProtocolError: the table is malformed; a file is too short, can shrink or cannot be mapped.
        """
        _check_table(regions)
        if len(regions) != len(files):
            raise GuestProtocolError(f"{len(files)} files came with {len(regions)} memory regions")
        self._regions = tuple(regions)
        spans = []
        for region, file in zip(regions, files, strict=True):
            spans.append((region.guest_address, region.guest_address + region.size, _map(region, file)))
        # Nearly every address is in the largest region: it is looked at first.
        self._spans = sorted(spans, key=lambda span: span[0] - span[1])

    def _slice(self, address: int, length: int) -> memoryview:
        for start, end, view in self._spans:
            if start <= address < end:
                if length > end - address:
                    break
                offset = address - start
                return view[offset : offset + length]
        raise _outside(address, length)

    def read(self, address: int, length: int) -> memoryview:
        """See `GuestMemory`; the view is live: what it shows may change at any time."""
        return self._slice(address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """See `GuestMemory`."""
        self._slice(address, len(data))[:] = data

    def borrow(self, address: int, length: int) -> memoryview:
        """See `GuestMemory`; it is the guest's memory itself."""
        return self._slice(address, length)

    def commit(self, address: int, filled: memoryview) -> None:
        """See `GuestMemory`; there is nothing left to do."""

    def load16(self, address: int) -> int:
        """See `GuestMemory`; one machine load."""
        return self._slice(address, 2).cast("H")[0]

    def store32(self, address: int, value: int) -> None:
        """See `GuestMemory`; one machine store."""
        self._slice(address, 4).cast("I")[0] = value

    def guest_address(self, user_address: int, length: int) -> int:
        """See `GuestMemory`."""
        return _translate(self._regions, user_address, length)

    def close(self) -> None:
        """See `GuestMemory`; a region is unmapped when the last view of it is gone."""
        self._spans = []


def _map(region: Region, file: int) -> memoryview:
    """Map one region, refusing whatever could turn a touch of the mapping into a signal."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:
        raise GuestProtocolError(
            "guest memory is no memfd; give QEMU memory-backend-memfd,share=on"
        ) from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise GuestProtocolError("guest memory is not sealed against shrinking; give QEMU seal=on")
    end = region.file_offset + region.size
    if end > os.fstat(file).st_size:
        raise GuestProtocolError(f"a memory region ends at {end:#x}, beyond the end of its file")
    skip = region.file_offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(file, region.size + skip, offset=region.file_offset - skip)
    except (OSError, OverflowError, ValueError) as error:
        raise GuestProtocolError(f"{region.size} bytes of guest memory cannot be mapped: {error}") from None
    return memoryview(mapping)[skip:]


class ProcessMemory:
    """A guest's memory through `/proc/PID/mem` of the front-end; see `GuestMemory`.

    Needs the right to trace that process (Yama allows it to a parent). The kernel copies two bytes one by
    one, so that an index that changes meanwhile can be read torn: a load is repeated until two agree. It
    copies four aligned bytes at once, which is why rings are updated by 32-bit stores.
    """

    def __init__(self, regions: Sequence[Region], pid: int) -> None:
        """Open the memory of a front-end.

        Args:
            regions: the memory table.
            pid: the front-end's process id, in this process's pid namespace.

        Raises:
            GuestProtocolError: the table is malformed or the process's memory cannot be opened.
        """
        _check_table(regions)
        self._regions = tuple(sorted(regions, key=lambda region: -region.size))
        self._scratch = bytearray()
        try:
            self._file = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise GuestProtocolError(f"the memory of process {pid} cannot be opened: {error}") from None

    def _locate(self, address: int, length: int) -> int:
        for region in self._regions:
            offset = address - region.guest_address
            if 0 <= offset < region.size:
                if length > region.size - offset:
                    break
                return region.user_address + offset
        raise _outside(address, length)

    def read(self, address: int, length: int) -> bytes:
        """See `GuestMemory`; a copy."""
        place = self._locate(address, length)
        try:
            data = os.pread(self._file, length, place)
        except (OSError, OverflowError) as error:
            raise _unreachable(address, length, error) from None
        if len(data) != length:
            raise _unreachable(address, length, "the process is gone or has nothing there")
        return data

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """See `GuestMemory`."""
        place = self._locate(address, len(data))
        try:
            written = os.pwrite(self._file, data, place)
        except (OSError, OverflowError) as error:
            raise _unreachable(address, len(data), error) from None
        if written != len(data):
            raise _unreachable(address, len(data), "the process is gone or has nothing there")

    def borrow(self, address: int, length: int) -> memoryview:
        """See `GuestMemory`; a buffer of this process's own."""
        self._locate(address, length)
        if len(self._scratch) < length:
            self._scratch = bytearray(length)
        return memoryview(self._scratch)[:length]

    def commit(self, address: int, filled: memoryview) -> None:
        """See `GuestMemory`; writes the bytes."""
        self.write(address, filled)

    def load16(self, address: int) -> int:
        """See `GuestMemory`; two loads that agree."""
        value = self.read(address, 2)
        for _ in range(_LOADS):
            again = self.read(address, 2)
            if again == value:
                break
            value = again
        return int.from_bytes(value, "little")

    def store32(self, address: int, value: int) -> None:
        """See `GuestMemory`."""
        self.write(address, value.to_bytes(4, "little"))

    def guest_address(self, user_address: int, length: int) -> int:
        """See `GuestMemory`."""
        return _translate(self._regions, user_address, length)

    def close(self) -> None:
        """See `GuestMemory`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _unreachable(address: int, length: int, reason: object) -> GuestProtocolError:
    return GuestProtocolError(f"{length} bytes of guest memory at {address:#x} cannot be reached: {reason}")
