"""The relay: five Jupyter channels between clients and a guest, and the truth when the guest is gone.

Theory of operation.

    clients           relay (client.py, libzmq │ guest.py, zmtp.py)     kernel
    DEALER, REQ ────▶ ROUTER                   │ DEALER ──────────────▶ ROUTER   control, shell, stdin
    REQ ───────────▶ ROUTER (answers itself)                            hb
    SUB ◀──────────── XPUB                     │ SUB ◀───────────────── XPUB     iopub

ROUTER and DEALER are transparent: the client's identity travels as the first frame, both ways. The kernel
sees one peer whose identity is the same on all channels, and the client's identity behind it; so an
`input_request` sent "to where the request on shell came from" reaches that client's stdin. Heartbeats are
answered here, from before the guest is up until it is known to be dead: clients that count them give up
after a second, which an emulated guest may well be busy for.

The two sides are made in either order, and messages flow from `start` on: a kernel's clients may come before
its VM is up, what they send waits in their sockets; a VM that waits in a pool is connected before it has a
client, what it says then nobody has asked for. The clients' sockets outlive the VM. Back-pressure goes both
ways: a guest that does not read makes the clients of that channel wait (never dropping), clients that do not
read make the guest wait within the rules of outlet.py. Every message from the guest must have a message's
shape; what does not is a GuestProtocolError in `failed`, once, and the guest is read no more. Signatures are
the client's to check, but for replies to what is noted as unanswered: a forged one answers nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import zmq

from sandbox_kernel.death import Death
from sandbox_kernel.errors import ConfigurationError, GuestProtocolError, MessageSizeLimitExceeded
from sandbox_kernel.relay import death, guest, message, outputs, zmtp
from sandbox_kernel.relay.brake import Brake
from sandbox_kernel.relay.client import ClientSocket, Curve
from sandbox_kernel.relay.guest import Dial, GuestChannel, Listener
from sandbox_kernel.relay.limits import RelayLimits
from sandbox_kernel.relay.message import Author, Signer
from sandbox_kernel.relay.pending import CellWatcher, PendingRequests, Unanswered
from sandbox_kernel.relay.welcome import KIND as WELCOME
from sandbox_kernel.relay.welcome import welcome
from sandbox_kernel.relay.zmtp import Frame, LeftOut

log = logging.getLogger(__name__)

CHANNELS: Final = ("control", "shell", "stdin", "hb", "iopub")
GUEST_CHANNELS: Final = ("control", "shell", "stdin", "iopub")

_WELCOME: Final = WELCOME.encode()
_INPUT: Final = b"execute_input"
_STATUS: Final = b"status"
_NO_SCHEME: Final = "hmac-sha256"
"""Until `bind` names one; nothing is signed before."""


@dataclass(frozen=True)
class ClientEndpoints:
    """Where clients connect.

    Attributes:
        addresses: ZMQ address to bind (ipc:// or tcp://), by channel.
        curve_publickey: Z85; with the secret key, clients must speak CURVE and know this key.
        curve_secretkey: Z85.
    """

    addresses: Mapping[str, str]
    curve_publickey: bytes | None = None
    curve_secretkey: bytes | None = None


class Relay:
    """Connects one set of client endpoints with one guest."""

    def __init__(self, limits: RelayLimits = RelayLimits()) -> None:  # noqa: B008 (frozen)
        """A relay with neither side yet, within `limits`; needs a running event loop."""
        self._limits = limits
        self._signer = Signer(b"", _NO_SCHEME)
        self._author = Author(self._signer)
        self._pending = PendingRequests(limits.requests)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: dict[str, ClientSocket] = {}
        self._guest: dict[str, GuestChannel] = {}
        self._welcomed = asyncio.Event()
        self._initialised = asyncio.Event()
        self._forwarding = False
        self._over = False
        self._closing: asyncio.Task[None] | None = None
        self._allowance = outputs.Allowance(limits.output_bytes)
        self._brake = Brake(limits.message_rate, partial(self._hold, "iopub", "rate"))
        self._held: dict[str, set[str]] = {channel: set() for channel in GUEST_CHANNELS}
        self._pending.watchers.append(self)
        self.notice = ""
        """A sentence that the first cell begins with; empty for none."""
        self.cells = 0
        """How many cells have begun."""
        self.used = time.monotonic()
        """When a client has last asked for something (monotonic seconds)."""
        self.shutdown_requested = False
        """A client has asked the kernel to shut down; its end will be no surprise."""
        self.failed: asyncio.Future[GuestProtocolError] = asyncio.get_running_loop().create_future()
        """Resolved with what the guest did wrong, if it does."""

    @property
    def unanswered(self) -> int:
        """Requests that the kernel has not answered yet."""
        return len(self._pending)

    @property
    def running(self) -> list[Unanswered]:
        """The cells that run."""
        return self._pending.running

    def watch(self, watcher: CellWatcher) -> None:
        """Tells `watcher` of each cell from now on."""
        self._pending.watchers.append(watcher)

    def limit(self, limits: RelayLimits) -> None:
        """Has `limits` hold from now on, for what is connected, too."""
        self._limits = limits
        self._allowance = outputs.Allowance(limits.output_bytes)
        self._brake = Brake(limits.message_rate, partial(self._hold, "iopub", "rate"))
        for name, channel in self._guest.items():
            channel.bound(self._bounds(name))

    def bind(self, client: ClientEndpoints, key: bytes, signature_scheme: str) -> None:
        """Listens for clients; what they send waits until the guest is attached.

        Args:
            client: where clients connect.
            key: the session's key.
            signature_scheme: `hmac-sha256` or another of Jupyter's.

        Raises:
            ConfigurationError: a channel has no address or one that cannot be bound to, or the scheme is
                unknown.
            HostError: an address is taken.
        """
        missing = [channel for channel in CHANNELS if channel not in client.addresses]
        if missing:
            raise ConfigurationError(f"The connection info has no address for {', '.join(missing)}.")
        self._signer = Signer(key, signature_scheme)
        self._author = Author(self._signer)
        public, secret = client.curve_publickey, client.curve_secretkey
        curve = Curve(public, secret) if public and secret else None
        for channel in CHANNELS:
            self._sockets[channel] = ClientSocket(self._context, channel, self._limits, curve)
            self._sockets[channel].bind(client.addresses[channel])
        self._sockets["hb"].start(self._on_beat, lambda stalled: None)

    async def attach(self, dial: Dial) -> None:
        """Connects to the guest's channels.

        Returns when every channel's handshake is done and the relay's subscription is in force. The caller
        sets the deadline; after a cancellation it may be called again.

        Args:
            dial: connects to a channel of the guest; called again until the kernel has bound it.

        Raises:
            GuestProtocolError: the guest broke the protocol; `failed` tells it, too.
        """
        made: dict[str, GuestChannel] = {}

        def make(channel: str) -> GuestChannel:
            self._raise_failure()
            made[channel] = self._guest_channel(channel)
            return made[channel]

        try:
            connected = await asyncio.gather(
                *(
                    guest.connect(partial(make, channel), dial, self._limits.retry)
                    for channel in GUEST_CHANNELS
                )
            )
            self._guest = dict(zip(GUEST_CHANNELS, connected, strict=True))
            self._guest["iopub"].send([zmtp.SUBSCRIBE_ALL])
            try:
                async with asyncio.timeout(self._limits.welcome):
                    await self._welcomed.wait()
            except TimeoutError:
                log.info("the kernel sends no iopub_welcome")
            self._raise_failure()
        except BaseException:
            for channel in made.values():
                channel.close()
            self._guest = {}
            raise

    def detach(self) -> None:
        """Lets go of the guest's channels before `start`: their kernel is to be replaced by another one."""
        for channel in self._guest.values():
            channel.close()
        self._guest = {}
        self._welcomed.clear()

    def start(self) -> None:
        """Forwards from now on, between the clients of `bind` and the guest of `attach`."""
        self._forwarding = True
        for name in GUEST_CHANNELS:
            sock = self._sockets[name]
            receive = self._on_subscription if name == "iopub" else partial(self._on_request, name)
            sock.start(receive, partial(self._hold, name, "slow clients"))

    async def initialised(self) -> None:
        """Returns when a kernel that has just been started can answer, or when that takes too long.

        A kernel binds its sockets long before it reads them; when it does, it publishes its first status.
        """
        try:
            async with asyncio.timeout(self._limits.initialised):
                await self._initialised.wait()
        except TimeoutError:
            log.info("the kernel accepts connections, but has not published a status yet")

    async def drain(self, timeout: float) -> None:
        """Forwards what the guest has still sent, until it hangs up, at most for `timeout` seconds."""
        closed = [channel.closed for channel in self._guest.values()]
        if closed:
            await asyncio.wait(closed, timeout=timeout)

    def hasten(self) -> None:
        """Lets what the guest has published already pass at once: its end is waited for."""
        if self._guest:
            self._brake.hasten()

    def say(self, parent: bytes, text: str) -> None:
        """Shows clients a line of ours in the output of the cell whose header is `parent`."""
        if self._forwarding:
            self._sockets["iopub"].send(outputs.notice(text, self._author, parent))

    async def report_death(self, cause: Death) -> None:
        """Tells everybody who waits for an answer why none will come; see death.py."""
        await self.drain(self._limits.last_words)
        self._end_guest()
        for name in ("control", "shell") if self._sockets else ():
            for frames in self._sockets[name].collect(self._limits.requests):
                self._on_request(name, frames)
        for channel, answer in death.report(self._pending, cause, self._author, time.monotonic()):
            self._sockets[channel].send(answer)
        self._pending.forget()

    async def aclose(self) -> None:
        """Ends everything; last messages reach clients within the linger time. Idempotent."""
        self._end_guest()
        for sock in self._sockets.values():
            sock.close()
        if self._closing is None:
            # Waits, bounded by the sockets' linger, until libzmq has sent what it has.
            self._closing = asyncio.ensure_future(asyncio.to_thread(self._context.term))
        await asyncio.shield(self._closing)

    def _guest_channel(self, channel: str) -> GuestChannel:
        return GuestChannel(
            channel,
            self._bounds(channel),
            self._limits.guest_unread_bytes,
            Listener(
                message=partial(self._receivers[channel], self, channel),
                left_out=partial(self._on_left_out, channel),
                writable=lambda writable: self._on_writable(channel, writable),
                broken=self._fail,
            ),
        )

    def _bounds(self, channel: str) -> zmtp.Bounds:
        return zmtp.Bounds(self._limits.message_bytes[channel], self._limits.message_frames)

    def _hold(self, channel: str, reason: str, hold: bool) -> None:
        """Lets the guest wait on a channel as long as there is any reason to."""
        reasons = self._held[channel]
        if hold:
            reasons.add(reason)
        else:
            reasons.discard(reason)
        self._guest[channel].pause(bool(reasons))

    def began(self, cell: Unanswered) -> None:
        """A cell has begun."""
        self.cells += 1
        if len(self._pending.running) == 1:
            self._allowance.renew()

    def ended(self, cell: Unanswered) -> None:
        """A cell has ended."""
        self.used = time.monotonic()

    def _on_writable(self, channel: str, writable: bool) -> None:
        if self._forwarding:
            self._sockets[channel].pause(not writable)

    def _raise_failure(self) -> None:
        if self.failed.done():
            raise self.failed.result()

    def _end_guest(self) -> None:
        self._over = True
        for channel in self._guest.values():
            channel.close()

    def _fail(self, error: GuestProtocolError) -> None:
        self._end_guest()
        if not self.failed.done():
            log.error("%s", error)
            self.failed.set_result(error)

    def _on_request(self, channel: str, frames: list[bytes]) -> None:
        self.used = time.monotonic()
        if channel in ("shell", "control"):
            request = message.read_request(channel, frames, self._signer, self._limits.identities)
            if request is not None:
                self._pending.asked(request)
                self.shutdown_requested |= request.kind == "shutdown_request"
        if not self._over:
            self._guest[channel].send(frames)

    def _on_subscription(self, frames: list[bytes]) -> None:
        answer = welcome(frames[0], self._author)
        if answer is not None:
            self._sockets["iopub"].send(answer)

    def _on_reply(self, channel: str, frames: list[Frame]) -> None:
        at = self._shape(channel, frames)
        if at is None:
            return
        if at == 0:
            self._fail(_malformed(channel, "has no identity"))
            return
        self._to_clients(channel, frames)
        if channel != "stdin":
            asked = message.read_parent(frames, at)
            if asked is not None and self._signer.verifies(frames[at + 1], frames[at + 2 : at + 6]):
                self._pending.answered(channel, tuple(map(bytes, frames[:at])), asked)

    def _on_left_out(self, channel: str, what: LeftOut) -> None:
        """A message was larger than one may be: who waits for it is told so in its place."""
        at = message.find_beginning(what.frames, self._limits.identities)
        if self._over:
            return
        if at is None or channel == "stdin":
            self._fail(_malformed(channel, f"of {what.size} bytes is none of Jupyter's"))
            return
        text = outputs.too_large(what.size, self._limits.message_bytes[channel])
        log.warning("%s", text)
        if channel == "iopub":
            self.say(self._cell_of(what.frames, at), text)
            return
        kind = message.read_kind(what.frames, at)
        if not kind.endswith("_reply"):
            self._fail(_malformed(channel, f"of {what.size} bytes is no reply"))
            return
        name = MessageSizeLimitExceeded.__name__
        content = {"status": "error", "ename": name, "evalue": text, "traceback": [f"{name}: {text}"]}
        answer = self._author.message(kind, content, bytes(what.frames[at + 3]))
        self._on_reply(channel, [*what.frames[:at], *answer])

    def _on_output(self, channel: str, frames: list[Frame]) -> None:
        at = self._shape(channel, frames)
        if at is None:
            return
        if message.is_kind(frames, at, _WELCOME):
            self._welcomed.set()
            return
        begins = message.is_kind(frames, at, _INPUT)
        if begins:
            self._count(frames, at)
        elif not self._initialised.is_set() and message.is_kind(frames, at, _STATUS):
            self._initialised.set()
        if self._allowance.limited and self._forwarding:
            for admitted in self._allowance.admit(frames, at, self._author, self._cell_of(frames, at)):
                self._to_clients(channel, admitted)
        else:
            self._to_clients(channel, frames)
        if begins and self.notice and self._forwarding:
            self.say(bytes(frames[at + 3]), self.notice)
            self.notice = ""
        self._brake.published()

    def _cell_of(self, frames: Sequence[Frame], at: int) -> bytes:
        """Header of the cell that an output is of: the one that runs, or what the kernel says."""
        running = self._pending.running
        return running[0].request.header if running else bytes(frames[at + 3])

    def _to_clients(self, channel: str, frames: Sequence[Frame]) -> None:
        if self._forwarding:
            self._sockets[channel].send(frames)

    def _on_beat(self, frames: list[bytes]) -> None:
        """A heart beats as long as the VM is not known to be dead, however slow the guest is just now."""
        if not self._over:
            self._sockets["hb"].send(frames)

    _receivers: Final = {
        "control": _on_reply,
        "shell": _on_reply,
        "stdin": _on_reply,
        "iopub": _on_output,
    }

    def _shape(self, channel: str, frames: list[Frame]) -> int | None:
        """Where the delimiter stands; None, and the guest has failed, when there is none."""
        if self._over:
            return None
        at = message.find_delimiter(frames, self._limits.identities)
        if at is None:
            self._fail(_malformed(channel, "is none of Jupyter's"))
        return at

    def _count(self, frames: list[Frame], at: int) -> None:
        count, asked = (
            message.read_content(frames, at).get("execution_count"),
            message.read_parent(frames, at),
        )
        if isinstance(count, int) and asked is not None:
            self._pending.counted(asked, count)


def _malformed(channel: str, what: str) -> GuestProtocolError:
    return GuestProtocolError(f"The guest broke the protocol of channel {channel}: a message {what}.")
