"""The virtio-vsock device: moves packets between two virtqueues and local sockets (virtio 1.2, 5.10).

Theory of operation. Everything happens in `turn`, which never blocks and does a bounded amount of work. One
epoll, edge-triggered, watches the driver's kicks and all local sockets; the event loop watches that epoll.
A turn

1. notes what became ready,
2. takes packets from the *transmit* queue (guest to host), passes headers to the muxer and payloads to the
   sockets,
3. fills buffers of the *receive* queue (host to guest): first what the muxer owes, then data of the streams
   that have some and have credit, in turn, a quantum each.

Bytes go from guest memory into a socket and from a socket into guest memory without a copy in between, except
what a slow local reader leaves (`LocalStream.backlog`).

Rules that this file keeps:

1. Work in a turn is bounded; a turn that stops early asks for another one. No stream can starve another.
2. The transmit queue is never stalled by a slow stream: credit bounds what a stream may send ahead. It is
   stalled while the muxer is congested, that is, while the guest does not take answers.
3. Nothing keeps a view of guest memory beyond a turn.
4. Chains of the transmit queue are returned in the turn that took them: Linux counts what is not returned
   against the sending socket's buffer, so that holding them back to save interrupts stops the guest.
5. Kicks for the receive queue are asked for only while it is empty and bytes wait for it.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from typing import Final

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.ring import Ring
from sandbox_kernel.virtio.memory import GuestMemory
from sandbox_kernel.virtio.queue import Chain, SplitQueue
from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import DATA, ENDED, OPENED, PEER_DEAF, PEER_DONE, State
from sandbox_kernel.vsock.muxer import Muxer
from sandbox_kernel.vsock.stream import Answer, LocalStream

RECEIVE_QUEUE: Final = 0
TRANSMIT_QUEUE: Final = 1
MAX_CHAIN: Final = packet.SIZE + packet.MAX_PAYLOAD
"""Bytes of the largest packet: of the largest chain in either queue."""

_EVENTS: Final = 64
_TRANSMIT_BUDGET: Final = 32
_RECEIVE_BUDGET: Final = 128
_QUANTUM: Final = 16


class Device:
    """The data path of one VM's vsock; it is told of its rings by a vhost-user backend."""

    def __init__(self, muxer: Muxer) -> None:
        """Args: muxer holds the streams."""
        self._muxer = muxer
        self._epoll = select.epoll()
        self._rings: dict[int, Ring] = {}
        self._kicks: dict[int, int] = {}
        self._by_socket: dict[int, LocalStream] = {}
        self._by_connection: dict[object, LocalStream] = {}
        self._ready: deque[LocalStream] = deque()
        self._transmit_pending = False

    def fileno(self) -> int:
        """What to wait for: readable when a turn is due."""
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._by_socket)

    @property
    def driver_is_up(self) -> bool:
        """True while the guest's driver has both queues running."""
        return len(self._rings) == 2

    def ring_started(self, ring: Ring) -> None:
        """See `vhost_user.backend.RingUser`; a new driver knows nothing of older streams."""
        if ring.fresh:
            self.reset()
        self.ring_stopped(ring)
        self._rings[ring.index] = ring
        if ring.kick >= 0:
            self._epoll.register(ring.kick, select.EPOLLIN | select.EPOLLET)
            self._kicks[ring.index] = ring.kick
        self._transmit_pending = True

    def ring_stopped(self, ring: Ring) -> None:
        """See `vhost_user.backend.RingUser`; streams stay, the VM may only be paused."""
        self._rings.pop(ring.index, None)
        kick = self._kicks.pop(ring.index, -1)
        if kick >= 0:
            self._epoll.unregister(kick)

    def open(self, port: int, sock: socket.socket, answer: Answer) -> LocalStream:
        """Join `sock` to a new stream to a port of the guest; a turn is due afterwards.

        Args:
            port: the guest's port.
            sock: a connected stream socket; the device's when this returns, the caller's when it raises.
            answer: told once whether the guest accepted.

        Raises:
            ConnectionRefusedError: the driver is not up, or there are too many streams.
        """
        if not self.driver_is_up:
            raise ConnectionRefusedError(f"the guest's vsock driver is not up, port {port} cannot be reached")
        connection = self._muxer.open(port)
        try:
            stream = LocalStream(connection, sock, self._epoll, answer)
        except BaseException:
            self._muxer.reset(connection)
            raise
        self._by_socket[stream.fd] = stream
        self._by_connection[connection] = stream
        return stream

    def abort(self, stream: LocalStream) -> None:
        """End a stream by RST and close its socket; a turn is due afterwards."""
        if stream.connection.state is not State.CLOSED:
            self._muxer.reset(stream.connection)
        self._drop(stream)

    def reset(self) -> None:
        """Close all streams without telling the guest."""
        self._muxer.clear()
        self._ready.clear()
        for stream in list(self._by_socket.values()):
            self._drop(stream)

    def close(self) -> None:
        """Close all streams and the epoll. Idempotent."""
        if not self._epoll.closed:
            self.reset()
            self._rings.clear()
            self._kicks.clear()
            self._epoll.close()

    def turn(self) -> bool:
        """Do what is due; True when there is more to do at once.

        Raises:
            GuestProtocolError: the guest broke the protocol; the device is to be closed.
        """
        self._collect()
        more = self._transmit()
        if self._receive():
            more = True
        # Answers that were taken may have made room for packets that waited for it.
        return more or (self._transmit_pending and self.driver_is_up and not self._muxer.congested)

    def _collect(self) -> None:
        """Note what became ready since the last turn."""
        transmit_kick = self._kicks.get(TRANSMIT_QUEUE, -1)
        for fd, events in self._epoll.poll(0, _EVENTS):
            stream = self._by_socket.get(fd)
            if stream is None:
                if fd == transmit_kick:
                    self._transmit_pending = True
                continue
            if events & (select.EPOLLHUP | select.EPOLLERR):
                stream.hung_up = True
            if events & select.EPOLLOUT and stream.backlog:
                self._flush(stream)
            if events & ~select.EPOLLOUT and stream.fd >= 0:
                if stream.eof:
                    self._settle(stream)
                else:
                    stream.readable = True
                    self._enqueue(stream)

    # Guest to host

    def _transmit(self) -> bool:
        """Take packets from the guest; True when the budget ended first."""
        ring = self._rings.get(TRANSMIT_QUEUE)
        queue = ring.queue if ring else None
        if ring is None or queue is None or not self._transmit_pending:
            return False
        left = _TRANSMIT_BUDGET
        while left and not self._muxer.congested:
            chain = queue.pop()
            if chain is None:
                if queue.accept_kicks():
                    continue
                self._transmit_pending = False
                break
            left -= 1
            if left == _TRANSMIT_BUDGET - 2:
                # A second packet already: the guest is busy sending, and we look by ourselves.
                queue.refuse_kicks()
            self._take(queue.memory, chain)
            queue.complete(chain.head, 0)
        if queue.publish():
            ring.interrupt()
        return left == 0

    def _take(self, memory: GuestMemory, chain: Chain) -> None:
        """Take one packet: its header to the muxer, its payload to the local socket."""
        if chain.writable:
            raise GuestProtocolError("the guest offers a buffer to write in vsock's transmit queue")
        parts = [memory.read(address, length) for address, length in chain.readable]
        if not parts or len(parts[0]) < packet.SIZE:
            parts = [b"".join(parts)]
        header = packet.parse(parts[0])
        if len(parts[0]) > packet.SIZE:
            parts[0] = memoryview(parts[0])[packet.SIZE :]
        else:
            del parts[0]
        if sum(map(len, parts)) != header.length:
            raise GuestProtocolError(
                f"a vsock header says {header.length} bytes, its packet has {sum(map(len, parts))}"
            )
        happened = self._muxer.receive(header)
        if happened is None:
            return
        connection, events = happened
        stream = self._by_connection.get(connection)
        if stream is None:
            return
        if events & DATA:
            connection.delivered(sum(map(stream.deliver, parts)))
        if events & OPENED:
            stream.answer(True)
        if events & ~DATA:
            self._follow(stream, events)
        if stream.lost:
            self._settle(stream)
        elif stream.readable:
            # The packet may have brought credit.
            self._enqueue(stream)

    def _follow(self, stream: LocalStream, events: int) -> None:
        """Carry a half-close or an end over to the local socket."""
        if events & PEER_DEAF:
            stream.refuse()
        if events & (PEER_DONE | ENDED):
            stream.peer_done = True
            if not stream.backlog:
                stream.finish()
        self._settle(stream)

    def _flush(self, stream: LocalStream) -> None:
        stream.connection.delivered(stream.flush())
        if not stream.backlog:
            if stream.peer_done:
                stream.finish()
            self._settle(stream)

    def _settle(self, stream: LocalStream) -> None:
        """Bring the stream's end on its way, as far as both sides have come."""
        connection = stream.connection
        if stream.fd < 0:
            return
        if connection.state is not State.CLOSED:
            flags = packet.SHUTDOWN_SEND if stream.eof else 0
            if stream.lost or (stream.hung_up and stream.eof) or (stream.peer_done and not stream.backlog):
                flags |= packet.SHUTDOWN_RECEIVE
            if flags == packet.SHUTDOWN_RECEIVE and not stream.lost:
                # The guest has finished and the local peer has not: nothing that the guest must know.
                flags = 0
            if flags and connection.state is not State.CONNECTING:
                self._muxer.shut(connection, flags)
        if connection.state in (State.CLOSING, State.CLOSED) and (stream.lost or not stream.backlog):
            self._drop(stream)

    def _drop(self, stream: LocalStream) -> None:
        self._by_socket.pop(stream.fd, None)
        self._by_connection.pop(stream.connection, None)
        stream.close()

    # Host to guest

    def _enqueue(self, stream: LocalStream) -> None:
        if not stream.queued and stream.connection.credit():
            stream.queued = True
            self._ready.append(stream)

    def _receive(self) -> bool:
        """Bring packets to the guest; True when the budget ended first."""
        ring = self._rings.get(RECEIVE_QUEUE)
        queue = ring.queue if ring else None
        if ring is None or queue is None:
            return False
        queue.refuse_kicks()
        left = _RECEIVE_BUDGET
        while left > 0 and (self._muxer.has_control or self._ready):
            chain = queue.pop()
            if chain is None:
                if queue.accept_kicks():
                    continue
                break
            if self._muxer.has_control:
                left -= self._send_control(queue, chain)
            else:
                queue.undo()
                left -= self._send_data(queue)
        if queue.publish():
            ring.interrupt()
        return left <= 0

    def _send_control(self, queue: SplitQueue, chain: Chain) -> int:
        """Send in `chain` what the muxer owes first; packets sent."""
        header = self._muxer.next_control()
        if header is None:
            queue.undo()
            return 0
        _writable(chain)
        _scatter(queue.memory, chain, packet.pack(header))
        queue.complete(chain.head, packet.SIZE)
        return 1

    def _send_data(self, queue: SplitQueue) -> int:
        """Send up to a quantum of packets of the stream whose turn it is; packets sent."""
        stream = self._ready.popleft()
        stream.queued = False
        sent = 0
        while sent < _QUANTUM and stream.readable:
            credit = stream.connection.credit()
            if not credit:
                return sent
            chain = queue.pop()
            if chain is None:
                break
            if not self._fill(queue, chain, stream, credit):
                queue.undo()
                if stream.eof:
                    self._settle(stream)
                return sent
            sent += 1
        self._enqueue(stream)
        return sent

    def _fill(self, queue: SplitQueue, chain: Chain, stream: LocalStream, credit: int) -> bool:
        """Fill one chain with a packet of data; False when the stream has none."""
        room = _writable(chain) - packet.SIZE
        memory = queue.memory
        if len(chain.writable) == 1:
            address = chain.writable[0][0]
            buffer = memory.borrow(address, packet.SIZE + room)
        else:
            address = -1
            buffer = memoryview(bytearray(packet.SIZE + room))
        count = stream.read_into(buffer[packet.SIZE : packet.SIZE + min(room, credit)])
        if not count:
            return False
        packet.LAYOUT.pack_into(buffer, 0, *stream.connection.data_header(count))
        filled = buffer[: packet.SIZE + count]
        if address >= 0:
            memory.commit(address, filled)
        else:
            _scatter(memory, chain, filled)
        queue.complete(chain.head, packet.SIZE + count)
        return True


def _writable(chain: Chain) -> int:
    """Bytes that a buffer of the receive queue takes; it must take a header and some payload."""
    if chain.readable:
        raise GuestProtocolError("the guest offers a buffer to read in vsock's receive queue")
    room = sum([length for _, length in chain.writable])
    if room <= packet.SIZE:
        raise GuestProtocolError(f"a vsock receive buffer of {room} bytes has no room for a packet")
    return room


def _scatter(memory: GuestMemory, chain: Chain, data: bytes | memoryview) -> None:
    """Spread `data` over a chain that has room for it."""
    offset = 0
    for address, length in chain.writable:
        part = data[offset : offset + length]
        if not len(part):
            break
        memory.write(address, part)
        offset += length
