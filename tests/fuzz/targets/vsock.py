"""Fuzz target: the vsock device, its virtqueues and packets, with arbitrary guest memory.

A script is a list of steps of a guest and of the local peers of its streams: store bytes anywhere, describe a
buffer with a tempting address, forge a packet that fits its chain, raise an index, have memory change while
the device reads it (`ambush`), begin anew with another driver; and open, write, read and close local sockets.
The device and its queues are real, guest memory is mapped or read and written as /proc/PID/mem is (without
that file, which is slow); epoll and sockets are `local.py`'s.

What is looked at: only `GuestProtocolError` comes out, and the VM is over then. The device writes to its used
rings and to the buffers that were offered for that, nowhere else; returns each chain once, with no more than
fits it; sends no more than its credit; keeps no more than its bounds; and comes to rest when nothing happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.protocol import RingAddresses
from sandbox_kernel.vhost_user.ring import Ring
from sandbox_kernel.virtio import memory as memory_module
from sandbox_kernel.virtio.memory import MappedMemory, ProcessMemory, Region
from sandbox_kernel.virtio.queue import Chain, SplitQueue
from sandbox_kernel.vsock import device as device_module
from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import State
from sandbox_kernel.vsock.device import MAX_CHAIN, RECEIVE_QUEUE, TRANSMIT_QUEUE, Device
from sandbox_kernel.vsock.muxer import Limits, Muxer
from tests.fuzz.local import Bell, Files, Local, Poll, pattern
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

LOW, HIGH, HIGH_AT = 0xC000, 0x4000, 1 << 32
"""Bytes of two regions of guest memory, and where the guest has the second one; the first is at 0."""
MEMORY = LOW + HIGH
ZEROS = bytes(MEMORY)
SIZE = 8
CID = 3
LIMITS = Limits(max_streams=4, max_closing=2, max_resets=4, window=4096)
DESCRIPTORS, AVAILABLE, USED = (0x000, 0x400), (0x100, 0x500), (0x200, 0x600)
USED_BYTES = 4 + 8 * SIZE
SLOTS = 0x1000
"""The n-th buffer of a queue is at (n + 1) times that; those to write at half of it."""
ADDRESSES = (0, LOW - 1, LOW - 44, LOW, HIGH_AT, HIGH_AT - 1, HIGH_AT + HIGH - 44, 1 << 63, (1 << 64) - 1)
LENGTHS = (43, 44, 45, 0, MAX_CHAIN, MAX_CHAIN + 1, (1 << 32) - 1, LOW, 4096 + 44, 4097 + 44)
FLAGS = (0, 1, 2, 3, 4, 0xFFFF)
SENT = {packet.REQUEST, packet.RST, packet.SHUTDOWN, packet.RW, packet.CREDIT_UPDATE}
MOST_STEPS = 400
TURNS = 20


class Watch:
    """What the device does to guest memory; mixed into both ways to it."""

    offered: tuple[tuple[int, int], ...] | list[tuple[int, int]] = ()
    """Where it may write, beside the used rings: the chain of the receive queue that it has taken last."""
    ambushes: list[list[Any]]

    def read(self, address: int, length: int) -> Any:
        if self.ambushes:
            self._spring()
        return super().read(address, length)  # type: ignore[misc]

    def load16(self, address: int) -> int:
        if self.ambushes:
            self._spring()
        return super().load16(address)  # type: ignore[misc, no-any-return]

    def write(self, address: int, data: Any) -> None:
        self._permit(address, len(data))
        super().write(address, data)  # type: ignore[misc]

    def store32(self, address: int, value: int) -> None:
        assert address in USED and 0 <= value < 1 << 32
        super().store32(address, value)  # type: ignore[misc]

    def borrow(self, address: int, length: int) -> memoryview:
        self._permit(address, length)
        return super().borrow(address, length)  # type: ignore[misc, no-any-return]

    def _permit(self, address: int, length: int) -> None:
        for start in USED:
            if start <= address and address + length <= start + USED_BYTES:
                return
        assert any(start <= address and address + length <= start + room for start, room in self.offered), (
            "the device writes where nothing was offered"
        )

    def _spring(self) -> None:
        for ambush in self.ambushes:
            ambush[0] -= 1
            if ambush[0] < 0:
                MACHINE.store(ambush[1], ambush[2])
        self.ambushes = [ambush for ambush in self.ambushes if ambush[0] >= 0]


class Mapped(Watch, MappedMemory):
    """The usual way."""


class Foreign(Watch, ProcessMemory):
    """The way to a restored VM's memory."""

    def __init__(self, regions: Sequence[Region], view: memoryview) -> None:
        super().__init__(regions, os.getpid())
        self.close()
        self._view = view
        self._user = regions[0].user_address

    def pread(self, file: int, length: int, place: int) -> bytes:
        assert self._user <= place and place + length <= self._user + MEMORY
        return bytes(self._view[place - self._user : place - self._user + length])

    def pwrite(self, file: int, data: bytes, place: int) -> int:
        assert self._user <= place and place + len(data) <= self._user + MEMORY
        self._view[place - self._user : place - self._user + len(data)] = data
        return len(data)


class Queue(SplitQueue):
    """A queue that is watched: its chains are what memory says, each goes back once, with what fits it."""

    held: list[Chain]
    device: Device
    receives: bool

    @property
    def steady(self) -> bool:
        """Memory is now what it was when the device looked."""
        return type(self.memory) is Mapped and not self.memory.ambushes

    def pop(self) -> Chain | None:
        chain = super().pop()
        if chain is not None:
            assert not self.steady or chain == simply(int(self.receives), chain.head)
            self.held.append(chain)
            assert len(self.held) == 1
            if self.receives:
                self.memory.offered = chain.writable  # type: ignore[attr-defined]
        return chain

    def undo(self) -> None:
        super().undo()
        self.held.pop()

    def complete(self, head: int, written: int) -> None:
        super().complete(head, written)
        chain = self.held.pop()
        assert chain.head == head and 0 <= written <= sum(length for _, length in chain.writable)
        assert len(self._done) <= 8 * SIZE
        if self.receives:
            assert not chain.readable
            if len(chain.writable) == 1 and self.steady:
                data = bytes(self.memory.read(chain.writable[0][0], written))
                self._sent(packet.parse(data), data[packet.SIZE :])
        else:
            assert not chain.writable
            if self.steady:
                data = b"".join(self.memory.read(*part) for part in chain.readable)
                self._taken(packet.parse(data), data[packet.SIZE :])

    def _sent(self, header: packet.Header, payload: bytes) -> None:
        """A packet to the guest is one that it may get, and says what the local peer said."""
        assert header.src_cid == packet.HOST_CID and header.dst_cid == CID
        assert header.operation in SENT and header.length == len(payload)
        if header.operation == packet.RW:
            connection = self.device._muxer._streams[header.src_port, header.dst_port]
            assert 0 < header.length <= packet.MAX_PAYLOAD
            assert connection._sent - connection._peer_fwd <= connection._peer_window
            assert payload == pattern(connection._sent - len(payload), len(payload))
        else:
            assert not payload

    def _taken(self, header: packet.Header, payload: bytes) -> None:
        """What the guest sent is the last that its stream has got, unless it is of no stream."""
        if (header.src_cid, header.dst_cid, header.type) != (CID, packet.HOST_CID, packet.STREAM):
            return
        connection = self.device._muxer._streams.get((header.dst_port, header.src_port))
        if header.operation != packet.RW or connection is None or connection.state is not State.OPEN:
            return
        stream = self.device._by_connection[connection]
        if not stream.lost and not connection._shutdown & packet.SHUTDOWN_RECEIVE:
            local: Any = stream._socket
            assert (local.tail + stream.backlog).endswith(payload)


def simply(ring: int, head: int) -> Chain:
    """The chain that memory has there, with nothing forgiven: the specification's rules once more."""
    readable: list[tuple[int, int]] = []
    writable: list[tuple[int, int]] = []
    table, index, total = DESCRIPTORS[1 - ring], head, 0
    for _ in range(SIZE):
        assert index < SIZE
        at = table + 16 * index
        address, length, flags, following = struct.unpack("<QIHH", MACHINE.bytes(at, 16))
        total += length
        assert not flags & 4 and total <= MAX_CHAIN
        assert flags & 2 or not writable
        if length:
            (writable if flags & 2 else readable).append((address, length))
        if not flags & 1:
            return Chain(head, readable, writable)
        index = following
    raise AssertionError("a chain without end was taken")


class Machine:
    """Guest memory, made once; each run finds it empty."""

    def __init__(self) -> None:
        file = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(file, MEMORY)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._mapping = mmap.mmap(file, MEMORY)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.user = at
        regions = [Region(0, LOW, at, 0), Region(HIGH_AT, HIGH, at + LOW, LOW)]
        self.mapped = Mapped(regions, [file, file])
        self._view = memoryview(self._mapping)
        self.foreign = Foreign(regions, self._view)
        os.close(file)

    def clear(self) -> None:
        self._view[:] = ZEROS
        self.mapped.ambushes, self.foreign.ambushes = [], []

    def store(self, place: int, data: bytes) -> None:
        """What the guest writes; `place` counts through both regions."""
        place %= MEMORY - len(data)
        self._view[place : place + len(data)] = data

    def bytes(self, place: int, count: int) -> bytes:
        return bytes(self._view[place : place + count])

    def load16(self, place: int) -> int:
        return int.from_bytes(self._view[place : place + 2], "little")


class Session:
    """One run: a device, its rings, the local peers."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.memory: Mapped | Foreign = MACHINE.foreign if script.number() == 100 else MACHINE.mapped
        MACHINE.clear()
        self.files = Files()
        self.poll = Poll(self.files)
        EPOLL[0] = self.poll
        self.muxer = Muxer(CID, LIMITS)
        self.device = Device(self.muxer)
        self.peers: list[Local] = []
        self.opened = self.answers = self.sent = 0
        self.rings = []
        for index in (RECEIVE_QUEUE, TRANSMIT_QUEUE):
            ring = Ring(index, MAX_CHAIN)
            ring.set_size(SIZE)
            at = MACHINE.user
            ring.set_addresses(
                RingAddresses(index, at + DESCRIPTORS[index], at + USED[index], at + AVAILABLE[index])
            )
            ring.kick, ring._kicked = self.files.add(Bell()), True
            ring.enable(True)
            self.rings.append(ring)
            self._run(ring)

    def _run(self, ring: Ring) -> None:
        assert ring.run(self.memory)
        queue = ring.queue
        queue.__class__ = Queue
        queue.held, queue.device, queue.receives = [], self.device, ring.index == RECEIVE_QUEUE  # type: ignore
        self.device.ring_started(ring)
        ring.fresh = False

    # What the guest does

    def store(self) -> None:
        MACHINE.store(self.script.number(), self.script.bytes(1 + self.script.below(64)))

    def ambush(self) -> None:
        if len(self.memory.ambushes) < 4:
            script = self.script
            self.memory.ambushes.append(
                [script.below(40), script.number(), script.bytes(1 + script.below(16))]
            )

    def describe(self) -> None:
        script = self.script
        ring, index = script.below(2), script.below(SIZE)
        address, length = script.number(), script.number()
        if address < 200:
            address = ADDRESSES[address] if address < len(ADDRESSES) else SLOTS * (address % 16)
        if length < len(LENGTHS):
            length = LENGTHS[length]
        self._describe(ring, index, address, length % (1 << 32), script.choose(FLAGS), script.below(SIZE + 2))

    def _describe(self, ring: int, index: int, address: int, length: int, flags: int, following: int) -> None:
        MACHINE.store(DESCRIPTORS[ring] + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self) -> None:
        script = self.script
        self._offer(script.below(2), script.number() % (1 << 16), script.number() % (1 << 16))

    def _offer(self, ring: int, head: int, ahead: int) -> None:
        at = AVAILABLE[ring]
        index = MACHINE.load16(at + 2)
        MACHINE.store(at + 4 + 2 * (index % SIZE), struct.pack("<H", head))
        MACHINE.store(at + 2, struct.pack("<H", (index + ahead) & 0xFFFF))

    def send(self) -> None:
        """A packet that fits its chain, so that the fuzzer gets behind the first checks."""
        script = self.script
        slot, operation = script.below(SIZE), script.below(9)
        stream = script.below(8)
        length = script.number() % 4500 if operation in (packet.RW, 0) else 0
        flags = script.below(4)
        window = script.choose((4096, 0, 100, (1 << 32) - 1, 1))
        self._send(slot, operation, stream, length, flags, window, script.number() % (1 << 32))
        self._offer(TRANSMIT_QUEUE, slot, 1)

    def _send(
        self, slot: int, operation: int, stream: int, length: int, flags: int, window: int, taken: int
    ) -> None:
        address = SLOTS * (slot + 1)
        header = (CID, 2, stream, 1024 + stream, length, 1, operation, flags, window, taken)
        self.sent += 1
        MACHINE.store(address, packet.LAYOUT.pack(*header) + pattern(self.sent, length))
        self._describe(TRANSMIT_QUEUE, slot, address, packet.SIZE + length, 0, 0)

    def send_in_pieces(self) -> None:
        """The same in a chain of two or three buffers, cut anywhere."""
        script = self.script
        stream, length = script.below(4), script.below(2000)
        first, second = script.below(100), script.below(500)
        self._send(0, packet.RW, stream, length, 0, 4096, 0)
        total, address = packet.SIZE + length, SLOTS
        first, second = min(first, total), min(second, total - min(first, total))
        self._describe(TRANSMIT_QUEUE, 0, address, first, 1, 1)
        self._describe(TRANSMIT_QUEUE, 1, address + first, second, 1, 2)
        self._describe(TRANSMIT_QUEUE, 2, address + first + second, total - first - second, 0, 0)
        self._offer(TRANSMIT_QUEUE, 0, 1)

    def accept(self) -> None:
        self._send(7, packet.RESPONSE, self.script.below(5), 0, 0, 4096, 0)
        self._offer(TRANSMIT_QUEUE, 7, 1)

    def receive(self) -> None:
        """An honest receive buffer."""
        slot = self.script.below(SIZE)
        self._describe(RECEIVE_QUEUE, slot, SLOTS * (slot + 1) + SLOTS // 2, 0x400, 2, 0)
        self._offer(RECEIVE_QUEUE, slot, 1)

    def receive_in_pieces(self) -> None:
        slot, first = self.script.below(SIZE), 1 + self.script.below(200)
        at = SLOTS * (slot + 1) + SLOTS // 2
        self._describe(RECEIVE_QUEUE, slot, at, first, 3, (slot + 1) % SIZE)
        self._describe(RECEIVE_QUEUE, (slot + 1) % SIZE, at + first, 0x200, 2, 0)
        self._offer(RECEIVE_QUEUE, slot, 1)

    def restart(self) -> None:
        """The VM was paused, or has another driver, which begins where the script says."""
        ring = self.rings[self.script.below(2)]
        where = self.script.number()
        self.device.ring_stopped(ring)
        ring.halt()
        if where < 200:
            MACHINE.store(AVAILABLE[ring.index], bytes(4))
            ring.set_base(0)
            ring.fresh = True
        self._run(ring)

    def stop(self) -> None:
        """The driver goes, with one of its queues, until `restart`."""
        ring = self.rings[self.script.below(2)]
        self.device.ring_stopped(ring)
        ring.halt()

    # What happens on the host

    def open(self) -> None:
        socket = Local(self.files, self.poll, self.script.number())
        try:
            self.device.open(self.script.below(5), socket, self._answered)  # type: ignore[arg-type]
        except ConnectionRefusedError:
            socket.close()
        else:
            self.opened += 1
            if len(self.peers) >= 8:
                self.peers.pop(0)
            self.peers.append(socket)

    def _answered(self, accepted: bool) -> None:
        self.answers += 1

    def local(self) -> None:
        if self.peers:
            peer = self.script.choose(self.peers)
            action, count = self.script.below(4), self.script.number() % 10_000
            if action == 0:
                peer.peer_sends(count)
            elif action == 1:
                peer.peer_reads(count)
            elif action == 2:
                peer.peer_ends()
            else:
                peer.peer_goes()

    def abort(self) -> None:
        streams = list(self.device._by_socket.values())
        if streams:
            self.device.abort(self.script.choose(streams))

    def turn(self) -> None:
        for ring in self.rings:
            self.poll.edge(ring.kick)
        for _ in range(TURNS):
            if not self.device.turn():
                break
        else:
            raise AssertionError("the device does not come to rest")
        self.check()

    def check(self) -> None:
        muxer, device = self.muxer, self.device
        assert len(muxer) <= LIMITS.max_streams + LIMITS.max_closing
        assert len(muxer._closing) <= LIMITS.max_closing
        assert len(muxer._resets) <= LIMITS.max_resets
        assert len(muxer._outbox) <= self.opened
        assert len(device._by_socket) == len(device._by_connection) <= self.opened
        assert len(device._ready) <= len(device._by_socket) + self.opened
        for number, stream in device._by_socket.items():
            connection = stream.connection
            assert number == stream.fd and number in self.files.open
            assert len(stream.backlog) <= LIMITS.window
            assert connection.credit() >= 0
            if not stream.lost and connection.state is State.OPEN:
                assert connection.undelivered == len(stream.backlog)

    def close(self) -> None:
        for ring in self.rings:
            self.device.ring_stopped(ring)
        self.device.close()
        assert self.answers == self.opened, "each who asked for a stream is told once"
        assert len(self.files.open) == len(self.rings), "a socket is left open"


Step = Callable[[Session], None]
STEPS: tuple[Step, ...] = (
    Session.turn,
    Session.send,
    Session.receive,
    Session.open,
    Session.accept,
    Session.local,
    Session.store,
    Session.describe,
    Session.offer,
    Session.ambush,
    Session.send_in_pieces,
    Session.receive_in_pieces,
    Session.restart,
    Session.abort,
    Session.stop,
)
EPOLL: list[Any] = [None]


def _run(data: bytes) -> None:
    script = Script(data)
    session = Session(script)
    try:
        for _ in range(MOST_STEPS):
            if not script.more():
                break
            script.choose(STEPS)(session)
        session.turn()
    except GuestProtocolError as error:
        assert 0 < len(str(error)) < 200
    session.close()


@contextmanager
def fuzzing() -> Iterator[Run]:
    global MACHINE
    MACHINE = Machine()
    constants = {name: getattr(select, name) for name in dir(select) if name.startswith("EPOLL")}
    device_module.select = SimpleNamespace(epoll=lambda: EPOLL[0], **constants)  # type: ignore[attr-defined]
    memory_module.os = MACHINE.foreign  # type: ignore[attr-defined]
    log = logging.getLogger("sandbox_kernel.vsock.muxer")
    log.disabled = True
    try:
        yield _run
    finally:
        log.disabled = False
        device_module.select = select  # type: ignore[attr-defined]
        memory_module.os = os  # type: ignore[attr-defined]
        MACHINE.mapped.close()
        del MACHINE


def seeds() -> Iterator[bytes]:
    turn, send, receive, open_, accept, local, store, describe, offer, ambush = range(10)
    sends, receives, restart, abort, stop = range(10, len(STEPS))
    for memory in (100, 0):
        head = write(memory)
        opened = head + b"".join(
            write(open_, 2500, port, receive, port, turn, accept, port, turn) for port in range(2)
        )
        data = write(send, 1, packet.RW, 1, 1000, 0, 0, 0, turn)
        yield opened
        yield head + b"".join(
            write(open_, 0, port, receive, port, turn, accept, port, turn) for port in range(6)
        )
        yield opened + data * 6 + write(local, 1, 1, 9000, turn) + data
        yield opened + data * 4 + write(local, 1, 1, 200, turn, local, 1, 1, 9000, turn) + data
        yield opened + data * 3 + write(local, 1, 3, 0, turn) + data
        yield opened + data * 3 + write(local, 1, 1, 5, local, 1, 3, 0, turn) + data
        yield opened + data * 3 + write(send, 2, packet.SHUTDOWN, 1, 2, 0, 0, turn, local, 1, 1, 900, turn)
        yield opened + write(local, 1, 3, 0) + data * 2 + write(receive, 2, turn)
        # More streams end than may wait for the guest's answer to that.
        many = b"".join(
            write(open_, 2500, port, receive, port, turn, accept, port, turn) for port in range(4)
        )
        gone = [word for peer in range(4) for word in (local, peer, 3, 0)]
        yield head + many + write(receive, 4, receive, 5, *gone, turn, receive, 6, receive, 7, turn)
        yield opened + write(send, 1, packet.RW, 1, 4097, 0, 0, 0, turn)
        # Both ways, to the end of both.
        yield opened + write(
            *(local, 1, 0, 3000, receive, 4, receive, 5, receive, 6, receive, 7, turn),
            *(send, 2, packet.CREDIT_UPDATE, 1, 0, 0, 3000, turn, local, 1, 2, 0, receive, 1, turn),
            *(send, 2, packet.SHUTDOWN, 1, 3, 0, 3000, turn, receive, 2, receive, 3, turn),
        )
        if memory:
            continue
        for operation in range(9):
            for flags in range(4):
                known = write(send, 3, operation, 1)
                known += write(10) if operation in (packet.RW, 0) else b""
                yield opened + known + write(flags, 0, 0, turn) + known + write(3, 1, 5, receive, 1, turn)
        for action in range(4):
            yield opened + write(local, 1, action, 500, turn, receive, 1, turn, local, 1, 3, 0, turn)
            yield opened + data * 6 + write(local, 1, action, 0, turn, local, 1, 3, 0, turn, receive, 1, turn)
        for queue in range(2):
            yield opened + write(stop, queue, turn, open_, 1, 1, restart, queue, 240, turn) + data
            yield opened + write(stop, queue, local, 0, 0, 90, turn, restart, queue, 0, turn) + data
        yield opened + write(abort, 1, turn, receive, 1, turn, restart, 0, 0, turn)
        yield opened + write(restart, 1, 240, turn) + data + write(restart, 0, 240, turn, restart, 1, 3, turn)
        # Nobody's packets, until the muxer is congested, and on.
        yield head + write(*(send, 0, packet.REQUEST, 6, 0, 0, 0, turn) * 8, *(receive, 1, turn) * 3)
        yield opened + write(
            sends, 1, 700, 20, 300, turn, sends, 1, 700, 44, 0, turn, sends, 1, 3, 0, 45, turn
        )
        yield opened + write(receives, 1, 10, local, 0, 0, 800, turn, receives, 3, 100, turn, receives, 5, 43)
        for number in range(len(LENGTHS)):
            for queue in range(2):
                yield opened + write(
                    describe, queue, 1, 35, number, 2 - 2 * queue, 0, offer, queue, 1, 1, turn
                )
        for number in range(len(ADDRESSES)):
            for queue in range(2):
                begin = opened + write(describe, queue, 1, number, 1, 2 - 2 * queue, 0, offer, queue, 1, 1)
                yield begin + write(local, 0, 0, 100, turn)
        for flags in range(len(FLAGS)):
            yield opened + write(describe, 1, 2, 35, 100, flags, 2, offer, 1, 2, 1, turn)
            yield opened + write(describe, 0, 2, 35, 100, flags, 3, offer, 0, 2, 1, local, 0, 0, 9, turn)
        for ahead in (0, 2, 8, 9, 65_535):
            yield opened + write(offer, 1, 200, ahead, turn, offer, 0, 1, ahead, local, 0, 0, 9, turn)
        for when in range(12):
            changed = write(ambush, when, SLOTS + 24, 3) + b"\xff\xff\xff\x00"
            yield opened + changed + write(send, 0, packet.RW, 1, 100, 0, 0, 0, turn)
            yield opened + write(ambush, when, AVAILABLE[1] + 2, 1) + b"\x07\x00" + data
        yield opened + write(store, DESCRIPTORS[1], 63) + bytes(range(64)) + data
