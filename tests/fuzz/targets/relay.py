"""Fuzz target: the relay, with what a guest says on its four channels and what clients do meanwhile.

A script has the guest send messages of Jupyter's and of its own, handshakes, pieces of frames and anything
else, hang up, and stop reading; and clients ask, subscribe, and stop reading, too. The `Relay`, its
`GuestChannel`s and their ZMTP are real, and so are the `ClientSocket`s and the clients: libzmq's, over
inproc, as what a hostile guest sends goes into libzmq in the end. Transports and event loop are doubles.

The sizes from which frames are treated as large are a small part of the real ones (`SIZES`), and so are the
limits. Whatever comes: nothing but a `GuestProtocolError` in `failed`, after which the guest is neither
heard nor answered; bounded bytes wait for guest and clients; what a client gets has a message's shape; and
the death report is signed JSON that answers each request that is still open.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import zmq

from sandbox_kernel.death import Death
from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.relay import client as client_module
from sandbox_kernel.relay import death as death_module
from sandbox_kernel.relay import message, zmtp
from sandbox_kernel.relay import relay as relay_module
from sandbox_kernel.relay.client import ClientSocket
from sandbox_kernel.relay.guest import GuestChannel
from sandbox_kernel.relay.limits import RelayLimits
from sandbox_kernel.relay.message import DELIMITER, Author, Signer
from sandbox_kernel.relay.outlet import Outlet
from sandbox_kernel.relay.relay import CHANNELS, GUEST_CHANNELS, Relay
from tests.fuzz import json_text
from tests.fuzz.loop import Loop, running
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

SIZES = {"_BUFFER": 4096, "_DIRECT": 2048, "_LAZY": 3000}
WITHOUT_COPY = 320
LARGEST = 6000
LIMITS = RelayLimits(
    message_bytes=dict.fromkeys(GUEST_CHANNELS, LARGEST),
    message_frames=12,
    identities=3,
    guest_unread_bytes=2000,
    client_messages=20,
    client_bytes=2000,
    stall=1.0,
    requests=4,
)
MORE_LIMITS = (LIMITS, replace(LIMITS, output_bytes=2500), replace(LIMITS, message_rate=10.0))
REPORT = death_module.report
KEY = b"key"
SIGNER = Signer(KEY, "hmac-sha256")
CLIENTS = (b"c0", b"c1")
KINDS = ("status", "execute_input", "iopub_welcome", "execute_reply", "stream", "input_request", "\ud800")
REQUESTS = ("execute_request", "kernel_info_request", "shutdown_request", "comm_open")
NAMES = ("msg_id", "msg_type", "execution_count", "execution_state", "session")
PEERS = {"iopub": "XPUB"}
MOST_STEPS = 200
# Plain integers: zmq's enumerations take longer than what is asked by them.
EVENTS, POLLIN, POLLOUT, NOBLOCK = map(int, (zmq.EVENTS, zmq.POLLIN, zmq.POLLOUT, zmq.NOBLOCK))
LONGEST_REQUEST = 1500


class Transport(asyncio.Transport):
    """A connection to the guest, which reads when the script says so."""

    def __init__(self, loop: Loop, channel: GuestChannel) -> None:
        super().__init__()
        self.waiting = bytearray()
        """What the guest has sent and the relay has not read."""
        self.unread = 0
        """Bytes that the guest has not read."""
        self.paused = self.lost = False
        self._loop = loop
        self._channel = channel
        self._high = 0
        self._closing = self._told = False
        channel.connection_made(self)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == LIMITS.guest_unread_bytes
        self._high = high

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        assert not self._closing and len(data)
        self.unread += len(data)
        assert self.unread <= self._high + 2 * LONGEST_REQUEST, "too much waits for the guest"
        if self.unread > self._high and not self._told:
            self._told = True
            self._channel.pause_writing()

    def pause_reading(self) -> None:
        assert not self._closing
        self.paused = True

    def resume_reading(self) -> None:
        assert not self._closing
        self.paused = False

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self.lose)

    def lose(self) -> None:
        """The connection is over."""
        if not self.lost:
            self.lost = self._closing = True
            self._channel.connection_lost(None)

    def guest_reads(self) -> None:
        self.unread = 0
        if self._told and not self._closing:
            self._told = False
            self._channel.resume_writing()

    def deliver(self) -> None:
        """Has the relay read what has come, as asyncio does."""
        at = 0
        while at < len(self.waiting) and not self.paused and not self._closing:
            space = self._channel.get_buffer(-1)
            count = min(len(space), len(self.waiting) - at)
            assert count
            space[:count] = self.waiting[at : at + count]
            at += count
            self._channel.buffer_updated(count)
        del self.waiting[:at]


class Watched(Outlet):
    """A large frame is released when clients read next: in libzmq a thread decides, some time after that."""

    def sent(self, size: int, released: Callable[[], bool]) -> None:
        super().sent(size, partial(ALL.read_since, ALL.reads))


class Strict(Relay):
    """A relay that passes no message over in silence."""

    def _shape(self, channel: str, frames: list[Any]) -> int | None:
        at = super()._shape(channel, frames)
        assert at is not None or self._over
        return at


class Clients:
    """libzmq's sockets on both sides, made once; a run begins and ends with nothing in them."""

    def __init__(self) -> None:
        self.reads = 0
        """How often the clients have read all there was."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: dict[str, ClientSocket] = {}
        self.peers: dict[tuple[str, int], zmq.Socket[bytes]] = {}
        with running():
            for channel in CHANNELS:
                made = self.sockets[channel] = ClientSocket(self.context, channel, LIMITS, None)
                # Nothing goes without a copy: who gives a frame to pyzmq's collector has the interpreter's
                # lock here, for which the collector waits; after a thousand each waits for the other. In a
                # relay libzmq's own threads give frames back.
                made._socket.copy_threshold = 1 << 30
                made.bind(f"inproc://{channel}")
        self.files = {channel: int(made._socket.FD) for channel, made in self.sockets.items()}
        for channel in GUEST_CHANNELS:
            for number, identity in enumerate(CLIENTS):
                peer = self.context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER)
                peer.linger, peer.rcvhwm, peer.identity = 0, LIMITS.client_messages, identity
                if channel == "iopub":
                    peer.subscribe(b"" if number else b"k")
                peer.connect(f"inproc://{channel}")
                self.peers[channel, number] = peer
        self.clear()

    def clear(self) -> None:
        for peer in self.peers.values():
            for _ in received(peer):
                pass
        for made in self.sockets.values():
            for _ in received(made._socket):
                pass
            made._loop = made._on_message = made._on_stall = None
            made._paused = made._stalled = made._due = False
            made._outlet = Watched(LIMITS.client_bytes, LIMITS.stall)

    def read_since(self, reads: int) -> bool:
        return self.reads > reads

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()
        for made in self.sockets.values():
            made._watcher = made._loop = None
            made.close()
        self.context.term()


def received(sock: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """What waits in a socket."""
    while sock.getsockopt(EVENTS) & POLLIN:  # type: ignore[operator]
        yield sock.recv_multipart(NOBLOCK)


class Session:
    """One run: a relay, its guest, its clients."""

    def __init__(self, script: Script, loop: Loop) -> None:
        self.script = script
        self.loop = loop
        self.asked = 0
        loop.stirred = self.stirred = set()
        begin = script.number()
        relay = self.relay = Strict(LIMITS)
        relay.notice = "A notice." if begin & 16 else ""
        relay.limit(MORE_LIMITS[begin // 4 % len(MORE_LIMITS)])
        relay._sockets = ALL.sockets
        relay._signer = SIGNER
        relay._author = Author(SIGNER, "session")
        self.transports: dict[str, Transport] = {}
        shaken = begin % 4 != 3
        for name in GUEST_CHANNELS:
            channel = relay._guest_channel(name)
            relay._guest[name] = channel
            transport = self.transports[name] = Transport(loop, channel)
            if shaken:
                transport.waiting += zmtp.greeting() + zmtp.ready(PEERS.get(name, "ROUTER"), b"")
                transport.deliver()
                assert channel._reader.ready and channel.ready.result() is True
        relay._guest["iopub"].send([zmtp.SUBSCRIBE_ALL])
        if script.below(4) != 3:
            relay.start()

    def _transport(self) -> Transport:
        return self.transports[GUEST_CHANNELS[self.script.below(4)]]

    def _send(self, transport: Transport, data: bytes) -> None:
        if not transport.is_closing() and len(transport.waiting) < 10_000:
            transport.waiting += data
            transport.deliver()

    # What the guest does

    def reply(self) -> None:
        """A message as a kernel would send it, more or less."""
        script = self.script
        transport = self._transport()
        shape = script.below(16)
        frames = [self._identity() for _ in range(script.below(6) if shape == 15 else 1)]
        frames.append(b"<IDS|MSX>" if shape == 14 else DELIMITER)
        kind = KINDS[script.below(len(KINDS))]
        parts = [header(msg_id="x", msg_type=kind, pad="p" * (400 if shape == 13 else 0))]
        parts += [header(msg_id=f"m{script.below(6)}"), b"{}"]
        parts.append(json.dumps({"execution_count": script.number(), "text": "t" * 300}).encode())
        frames += [signature_of(*parts) if shape < 8 else b"signature", *parts]
        if shape == 12:
            del frames[script.below(len(frames)) :]
            frames.append(b"")
        frames += [bytes(script.number() % 1200) for _ in range(script.below(5))]
        self._send(transport, b"".join(map(bytes, zmtp.encode(frames))))

    def strange(self) -> None:
        """A message of other frames."""
        script = self.script
        transport = self._transport()
        frames: list[bytes] = [self._identity() for _ in range(script.below(4))]
        frames.append(DELIMITER)
        for _ in range(script.below(9)):
            form = script.below(3)
            if form == 0:
                frames.append(script.string())
            elif form == 1:
                frames.append(json_text.an_object(script, NAMES))
            else:
                frames.append(bytes(script.number() % 3000))
        self._send(transport, b"".join(map(bytes, zmtp.encode(frames))))

    def _identity(self) -> bytes:
        at = self.script.below(8)
        return (*CLIENTS, b"kernel", b"", bytes(400), b"k" * 300, b"kk", b"\0xyz!")[at]

    def anything(self) -> None:
        transport = self._transport()
        self._send(transport, self.script.string())

    def head(self) -> None:
        script = self.script
        transport = self._transport()
        flags = script.below(8)
        length = script.number().to_bytes(8, "big")
        self._send(transport, bytes([flags]) + length[0 if flags & 2 else 7 :])

    def greet(self) -> None:
        name = GUEST_CHANNELS[self.script.below(4)]
        self._send(self.transports[name], zmtp.greeting() + zmtp.ready(PEERS.get(name, "ROUTER"), b"g"))

    def guest_reads(self) -> None:
        self._transport().guest_reads()

    def hang_up(self) -> None:
        transport = self._transport()
        if not transport.is_closing():
            if self.script.below(2):
                transport._channel.eof_received()
            else:
                transport.lose()

    # What clients do

    def ask(self) -> None:
        """A request, signed or not, of a size."""
        script = self.script
        channel = ("shell", "control", "stdin")[script.below(3)]
        peer = ALL.peers[channel, script.below(2)]
        head = header(msg_id=f"m{script.below(6)}", msg_type=script.choose(REQUESTS))
        parts = [head, b"{}", b"{}", b" " * (script.number() % 1000)]
        signature = b"false" if script.below(8) == 7 else signature_of(*parts)
        if peer.getsockopt(EVENTS) & POLLOUT:  # type: ignore[operator]
            peer.send_multipart([DELIMITER, signature, *parts], zmq.NOBLOCK)
        self._stir(channel)
        self.asked += 1

    def subscribe(self) -> None:
        peer = ALL.peers["iopub", self.script.below(2)]
        topic = b"t" + self.script.bytes(self.script.below(4))
        peer.subscribe(topic)
        peer.unsubscribe(topic)
        self._stir("iopub")

    def _stir(self, channel: str) -> None:
        """A client has done something to that socket: only then does epoll have its file read."""
        self.stirred.add(ALL.files[channel])

    def read(self) -> None:
        """Clients read what there is."""
        ALL.reads += 1
        for (channel, _), peer in ALL.peers.items():
            for frames in received(peer):
                before = 0 if channel == "iopub" else 1
                at = message.find_delimiter([b""] * before + frames, LIMITS.identities)
                assert at is not None, "a client gets what is no message"

    def turn(self) -> None:
        self.loop.run()
        self.stirred.clear()
        for transport in self.transports.values():
            transport.deliver()
        self.check()

    def wait(self) -> None:
        self.loop.pass_time(self.script.below(8) * 0.3)
        self.turn()

    def check(self) -> None:
        relay = self.relay
        assert relay.unanswered <= LIMITS.requests
        for channel in relay._guest.values():
            reader = channel._reader
            assert sum(map(len, reader._frames)) <= LARGEST
            assert reader._size <= LARGEST * zmtp._FAULT
            assert len(reader._frames) <= LIMITS.message_frames
        for sock in ALL.sockets.values():
            # What was read at once may have some more messages than the one that was too much.
            assert sock._outlet._sum <= LIMITS.client_bytes + LARGEST + SIZES["_BUFFER"]
        if relay.failed.done():
            assert isinstance(relay.failed.result(), GuestProtocolError)
            assert "channel" in str(relay.failed.result()) and relay._over
            assert all(transport.is_closing() for transport in self.transports.values())

    def die(self) -> None:
        """The end: what was asked and not answered is answered by the relay."""
        relay = self.relay
        relay._end_guest()
        self.loop.run()
        self.read()
        relay._guest = {}
        relay._forwarding = True
        sent: list[tuple[str, list[Any]]] = []
        for channel, made in ALL.sockets.items():
            made.send = partial(_keep, sent, channel)  # type: ignore[method-assign]
        OPEN.clear()
        death = Death("KernelDied", "It is dead.", by_user_code=bool(self.script.below(2)))
        report = relay.report_death(death)
        try:
            report.send(None)
        except StopIteration:
            pass
        else:
            raise AssertionError("a guest that is gone is waited for")
        for made in ALL.sockets.values():
            del made.send
        for channel, frames in sent:
            at = message.find_delimiter(frames, LIMITS.identities)
            assert at is not None and (at == 1) == (channel in ("shell", "control", "iopub"))
            assert SIGNER.verifies(frames[at + 1], frames[at + 2 : at + 6])
            for part in frames[at + 2 : at + 6]:
                assert isinstance(json.loads(part), dict)
        assert sum(channel == "iopub" for channel, _ in sent) >= len(OPEN)
        assert relay.unanswered == 0


@cache
def header(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@lru_cache(1 << 14)
def signature_of(*parts: bytes) -> bytes:
    return SIGNER.sign(parts)


Step = Callable[[Session], None]
STEPS: tuple[Step, ...] = (
    Session.turn,
    Session.reply,
    Session.ask,
    Session.strange,
    Session.read,
    Session.anything,
    Session.head,
    Session.greet,
    Session.guest_reads,
    Session.hang_up,
    Session.subscribe,
    Session.wait,
)


def _run(data: bytes) -> None:
    script = Script(data)
    with running() as loop:
        session = Session(script, loop)
        for _ in range(MOST_STEPS):
            if not script.more():
                break
            script.choose(STEPS)(session)
        session.turn()
        session.die()
    ALL.clear()


OPEN: list[Any] = []
"""What the death report of this run was asked to answer."""


def _report_all(unanswered: Any, *rest: Any) -> Any:
    OPEN.extend(unanswered)
    return REPORT(OPEN, *rest)


def _keep(sent: list[tuple[str, list[Any]]], channel: str, frames: list[Any]) -> None:
    sent.append((channel, frames))


@contextmanager
def fuzzing() -> Iterator[Run]:
    global ALL
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(zmtp, **SIZES))
        stack.enter_context(mock.patch.object(client_module, "_WITHOUT_COPY", WITHOUT_COPY))
        stack.enter_context(mock.patch.object(death_module, "report", _report_all))
        # A relay does nothing with its context but close it in the end.
        stack.enter_context(mock.patch.object(relay_module, "zmq", SimpleNamespace(Context=lambda: None)))
        for log in (relay_module.log, client_module.log):
            stack.enter_context(mock.patch.object(log, "disabled", True))
        ALL = Clients()
        stack.callback(ALL.close)
        yield _run


def seeds() -> Iterator[bytes]:
    turn, reply, ask, strange, read, anything, head, greet, reads, hang_up, subscribe, wait = range(
        len(STEPS)
    )
    iopub = GUEST_CHANNELS.index("iopub")
    shell = GUEST_CHANNELS.index("shell")
    asked = write(ask, 0, 0, 1, 0, 100, 0, turn)
    for first, second in ((0, 0), (0, 3), (4, 0), (8, 0), (16, 0), (20, 0)):
        begin = write(first, second)
        yield (
            begin
            + asked
            + write(reply, iopub, 0, 2, 1, 1, 7, 0, reply, shell, 0, 0, 3, 1, 0, 0, read, turn, read)
        )
        yield begin + write(*(reply, iopub, 0, 2, 0, 0, 0, 0) * 3, reply, iopub, 0, 2, 2, 0, 0, 0, read, turn)
        for shape in range(16):
            for channel in range(4):
                yield begin + asked + write(reply, channel, shape, 1, 0, 1, 5, 1, 500, read, turn, read)
        yield begin + b"".join(write(ask, n % 3, n % 2, n % 6, n % 4, 900, n % 8, turn) for n in range(12))
        yield begin + b"".join(
            write(ask, n % 2, 0, n, 0, 900, 0, turn, reads, 0, reads, 1, turn) for n in range(8)
        )
        for size in (300, 1100):
            flood = write(reply, iopub, 0, 2, 4, 0, 0, 2, size, size)
            yield begin + flood * 8 + write(turn, wait, 3, wait, 3, wait, 3, read, wait, 1, turn)
            yield begin + flood * 8 + write(read, wait, 1) + flood + write(hang_up, iopub, 0, turn)
        for end in range(2):
            yield begin + asked + write(hang_up, shell, end, turn, hang_up, iopub, end) + asked
        for channel in range(4):
            yield begin + asked + write(head, channel, 3, 2000, head, channel, 2, (1 << 64) - 1, turn) + asked
            yield begin + write(head, channel, 2, 1500, anything, channel, bytes(200), turn)
            yield begin + write(anything, channel, b"\x01\x00" * 20, turn) + asked
            for large in (2000, 2100, 2900):
                yield begin + write(reply, channel, 0, 0, 0, 0, 0, 2, 100, 100, turn)
                yield begin + write(strange, channel, 1, 0, 6, *(2, large % 3000) * 6, read)
            deep = b"[" * 1500
            for kind in (b"execute_input", b"status"):
                frames = (0, b"s", 0, kind + deep, 0, deep, 0, b"{}", 0, deep)
                yield begin + write(strange, channel, 1, 2, 5, *frames, read)
                header = b'{"msg_type":"%s"}' % kind
                yield begin + write(strange, channel, 1, 2, 5, 0, b"s", 0, header, 0, deep, 0, b"{}", 0, deep)
            yield begin + write(
                strange, channel, 1, 0, 5, 0, b"s", 1, 2, 0, 0, 4, 1, 1, 1, 1, 0, 2, 400, 1, 0, turn
            )
        yield begin + write(subscribe, 0, 2, 65, 66, turn, subscribe, 1, 2, 255, 255, turn, read)
        for identity in range(8):
            yield begin + asked + write(reply, shell, 15, 2, identity, 0, 3, 1, 0, 0, read)
    for channel in range(4):
        yield write(3, 0, greet, channel, turn, reply, channel, 0, 0, 0, 0, 0, 0, read)
        yield write(3, 0, anything, channel, b"HTTP/1.1 200 OK\r\n" + bytes(60), turn)
