"""A guest made of Python: the driver's side of virtio-vsock and the front-end's side of vhost-user.

It writes real split rings into a real memfd and hands that over by real messages, so that the device under
test runs exactly as with QEMU. It does what it is told, also when that is wrong: tests use it to misbehave.
Its methods block at most on the vhost-user handshake, for which tests use a thread.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.packet import Header

CID = 3
RX, TX = 0, 1

GUEST_BASE = 0x1000_0000
"""Guest address of the memory, and `USER_BASE` that of "QEMU's" mapping: neither is the file's offset."""
USER_BASE = 0x7F00_0000_0000

_SLOT = 64 * 1024 + 256
_NEXT, _WRITE = 1, 2


class Rings:
    """Where the three arrays of one queue are, as offsets into the memory."""

    def __init__(self, offset: int, size: int) -> None:
        self.size = size
        self.descriptors = offset
        self.available = offset + 16 * size
        self.used = (self.available + 4 + 2 * size + 3) & ~3
        self.end = (self.used + 4 + 8 * size + 4095) & ~4095
        self.offered = 0
        self.seen = 0
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class FakeGuest:
    """One guest with a vsock driver, on the front-end's end of a vhost-user socket."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        size: int = 64,
        buffer: int = 4140,
        seals: int = fcntl.F_SEAL_SHRINK,
        own_mapping: bool = False,
    ) -> None:
        """Args: own_mapping tells this process's address of the memory instead of `USER_BASE`."""
        sock.setblocking(True)
        self.sock = sock
        self.rx, self.tx = Rings(0, size), Rings(65536, size)
        self.buffer = buffer
        self._rx_at = 2 * 65536
        self._tx_at = (self._rx_at + size * buffer + 4095) & ~4095
        self.size = (self._tx_at + size * _SLOT + 4095) & ~4095
        self.file = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.file, self.size)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, seals)
        self.memory = mmap.mmap(self.file, self.size)
        self.user_base = USER_BASE
        if own_mapping:
            # A view that ctypes keeps would forbid to close the mapping.
            self.user_base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.window = 256 * 1024
        """What the guest says it can buffer a stream."""
        self.inbox: list[tuple[Header, bytes]] = []

    # vhost-user

    def request(self, number: int, payload: bytes, files: list[int] | None = None, flags: int = 1) -> None:
        data = struct.pack("<III", number, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        self.sock.sendmsg([data], rights)

    def reply(self) -> bytes:
        header = self.sock.recv(12, socket.MSG_WAITALL)
        if len(header) < 12:
            raise EOFError
        _, _, size = struct.unpack("<III", header)
        return self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, number: int, payload: bytes = b"") -> bytes:
        self.request(number, payload)
        return self.reply()

    def share_memory(self) -> None:
        table = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, self.size, self.user_base, 0)
        self.request(5, table, [self.file])

    def start_ring(self, index: int, base: int = 0) -> None:
        ring = (self.rx, self.tx)[index]
        self.request(8, struct.pack("<II", index, ring.size))
        self.request(10, struct.pack("<II", index, base))
        user = [self.user_base + at for at in (ring.descriptors, ring.used, ring.available)]
        self.request(9, struct.pack("<IIQQQQ", index, 0, *user, 0))
        self.request(12, struct.pack("<Q", index), [ring.kick])
        self.request(13, struct.pack("<Q", index), [ring.call])
        self.request(18, struct.pack("<II", index, 1))

    def stop_ring(self, index: int) -> int:
        _, base = struct.unpack("<II", self.ask(11, struct.pack("<II", index, 0)))
        return int(base)

    def start(self) -> None:
        """What QEMU does from its start until the guest's driver is up."""
        (features,) = struct.unpack("<Q", self.ask(1))
        (protocol_features,) = struct.unpack("<Q", self.ask(15))
        self.request(16, struct.pack("<Q", protocol_features))
        self.request(3, b"")
        self.ask(24, struct.pack("<III", 0, 8, 0) + bytes(8))
        self.request(2, struct.pack("<Q", features))
        self.share_memory()
        for slot in range(self.rx.size):
            self.offer(slot)
        self.start_ring(RX)
        self.start_ring(TX)
        self.ask(24, struct.pack("<III", 0, 8, 0) + bytes(8))

    # Rings

    def describe(
        self, ring: Rings, index: int, address: int, length: int, flags: int, following: int = 0
    ) -> None:
        struct.pack_into(
            "<QIHH", self.memory, ring.descriptors + 16 * index, address, length, flags, following
        )

    def make_available(self, ring: Rings, head: int) -> None:
        struct.pack_into("<H", self.memory, ring.available + 4 + 2 * (ring.offered % ring.size), head)
        ring.offered += 1
        struct.pack_into("<H", self.memory, ring.available + 2, ring.offered & 0xFFFF)

    def kick(self, ring: Rings) -> bool:
        """Kick, if the device wants it."""
        (flags,) = struct.unpack_from("<H", self.memory, ring.used)
        if not flags & 1:
            os.eventfd_write(ring.kick, 1)
        return not flags & 1

    def used(self, ring: Rings) -> list[tuple[int, int]]:
        """(head, bytes written) of the chains returned since the last call."""
        (index,) = struct.unpack_from("<H", self.memory, ring.used + 2)
        result = []
        while ring.seen & 0xFFFF != index:
            at = ring.used + 4 + 8 * (ring.seen % ring.size)
            result.append(struct.unpack_from("<II", self.memory, at))
            ring.seen += 1
        return result

    def offer(self, slot: int) -> None:
        """Offer one receive buffer, in one descriptor."""
        self.describe(self.rx, slot, GUEST_BASE + self._rx_at + slot * self.buffer, self.buffer, _WRITE)
        self.make_available(self.rx, slot)

    @property
    def room(self) -> int:
        """Packets that may be sent before the device returns a chain."""
        self.used(self.tx)
        return self.tx.size // 2 - (self.tx.offered - self.tx.seen)

    def put(self, data: bytes, payload: bytes | memoryview = b"") -> None:
        """Offer a chain of up to two descriptors to the device, without a kick."""
        slot = self.tx.offered % (self.tx.size // 2)
        at = self._tx_at + slot * _SLOT
        self.memory[at : at + len(data)] = data
        more = _NEXT if payload else 0
        self.describe(self.tx, 2 * slot, GUEST_BASE + at, len(data), more, 2 * slot + 1)
        if payload:
            self.memory[at + 64 : at + 64 + len(payload)] = payload
            self.describe(self.tx, 2 * slot + 1, GUEST_BASE + at + 64, len(payload), 0)
        self.make_available(self.tx, 2 * slot)

    # Packets

    def header(
        self, stream: Header, operation: int, length: int = 0, *, flags: int = 0, taken: int = 0
    ) -> Header:
        """A header of the guest's on the stream of one of the host's."""
        return Header(
            CID,
            packet.HOST_CID,
            stream.dst_port,
            stream.src_port,
            length,
            packet.STREAM,
            operation,
            flags,
            self.window,
            taken,
        )

    def send(
        self, stream: Header, operation: int, payload: bytes = b"", *, flags: int = 0, taken: int = 0
    ) -> None:
        """Send one packet and kick."""
        header = self.header(stream, operation, len(payload), flags=flags, taken=taken)
        self.put(packet.pack(header), payload)
        self.kick(self.tx)

    def take(self, *, give_back: bool = True) -> list[tuple[Header, bytes]]:
        """Packets that arrived since the last call; their buffers are offered again if `give_back`."""
        result = []
        for slot, written in self.used(self.rx):
            at = self._rx_at + slot * self.buffer
            header = packet.parse(self.memory[at : at + packet.SIZE])
            assert written == packet.SIZE + header.length
            result.append((header, self.memory[at + packet.SIZE : at + written]))
            if give_back:
                self.offer(slot)
        if result and give_back:
            self.kick(self.rx)
        return result

    async def receive(self, *, give_back: bool = True) -> tuple[Header, bytes]:
        """The next packet for the guest; waits for the device's interrupts."""
        while not self.inbox:
            self.inbox += self.take(give_back=give_back)
            if not self.inbox:
                await self.interrupt(self.rx)
        return self.inbox.pop(0)

    async def interrupt(self, ring: Rings) -> None:
        """Wait until the device interrupts for a queue."""
        loop = asyncio.get_running_loop()
        rung = loop.create_future()
        loop.add_reader(ring.call, lambda: rung.done() or rung.set_result(None))
        try:
            await asyncio.wait_for(rung, 10)
        finally:
            loop.remove_reader(ring.call)
        os.eventfd_read(ring.call)

    def wait(self, *rings: Rings) -> None:
        """Block until the device interrupts for one of the queues."""
        poll = select.poll()
        for ring in rings:
            poll.register(ring.call, select.POLLIN)
        for fd, _ in poll.poll(10_000):
            os.eventfd_read(fd)

    async def accept(self) -> Header:
        """Take a REQUEST and accept it; the header names the stream."""
        header, _ = await self.receive()
        assert header.operation == packet.REQUEST
        self.send(header, packet.RESPONSE)
        return header

    def close(self) -> None:
        self.sock.close()
        self.memory.close()
        for fd in (self.file, self.rx.kick, self.rx.call, self.tx.kick, self.tx.call):
            os.close(fd)
