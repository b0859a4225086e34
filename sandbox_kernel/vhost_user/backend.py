"""The back-end of vhost-user: what each request of the front-end does.

Theory of operation. `Backend.handle` is called with whole messages and answers with bytes or nothing. It
owns the guest's memory and the rings; whoever moves data is told when a ring started or stopped. The
features offered are the least that a device needs: VIRTIO_F_VERSION_1 of virtio, and of the protocol MQ
(there are two rings), CONFIG (the device has configuration space) and REPLY_ACK. Everything else, logging,
indirect descriptors, inflight tracking, back-end requests, is not offered, and asking for it is a violation.

Rules that this file keeps:

1. Every file descriptor of a message is either kept by a ring or closed when `handle` returns.
2. Memory is replaced as a whole, and rings that run go on with the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user import protocol
from sandbox_kernel.vhost_user.channel import Message
from sandbox_kernel.vhost_user.protocol import Request
from sandbox_kernel.vhost_user.ring import Ring
from sandbox_kernel.virtio.memory import GuestMemory, MappedMemory, Region

_F_PROTOCOL_FEATURES: Final = 1 << 30
_F_VERSION_1: Final = 1 << 32
FEATURES: Final = _F_VERSION_1 | _F_PROTOCOL_FEATURES
"""Virtio features offered (virtio 1.2, 6; vhost-user, "Feature negotiation")."""

_PROTOCOL_MQ: Final = 1 << 0
_PROTOCOL_REPLY_ACK: Final = 1 << 3
_PROTOCOL_CONFIG: Final = 1 << 9
PROTOCOL_FEATURES: Final = _PROTOCOL_MQ | _PROTOCOL_REPLY_ACK | _PROTOCOL_CONFIG
"""Protocol features offered (vhost-user, "Protocol features")."""

MemoryOpener = Callable[[Sequence[Region], Sequence[int]], GuestMemory]
"""Makes memory of a table and one file a row; the files stay the caller's."""


class RingUser(Protocol):
    """Whoever moves data through the rings."""

    def ring_started(self, ring: Ring) -> None:
        """`ring.queue` is there from now on; it is another one than before."""
        ...

    def ring_stopped(self, ring: Ring) -> None:
        """`ring.queue` is gone and `ring.kick` about to be closed."""
        ...


class Backend:
    """The state that a front-end has set up, and the answers to its requests."""

    def __init__(
        self,
        config: bytes,
        rings: Sequence[Ring],
        user: RingUser,
        open_memory: MemoryOpener = MappedMemory,
    ) -> None:
        """Begin with nothing set up.

        Args:
            config: the device's configuration space.
            rings: its virtqueues; from now on the backend's to close.
            user: who is told of them.
            open_memory: how guest memory is reached.
        """
        self._config = config
        self._rings = tuple(rings)
        self._user = user
        self._open_memory = open_memory
        self._memory: GuestMemory | None = None
        self._protocol_features = 0

    def handle(self, message: Message) -> bytes | None:
        """Do what a message asks; its files are taken or closed.

        Returns:
            The bytes to send back, None when the front-end expects nothing.

        Raises:
            GuestProtocolError: the front-end broke the protocol.
        """
        try:
            answer = self._dispatch(message)
        finally:
            message.close()
        if answer is None and message.envelope.need_reply and self._protocol_features & _PROTOCOL_REPLY_ACK:
            return protocol.reply_u64(message.envelope.request, 0)
        return answer

    def close(self) -> None:
        """Stop the rings and let go of memory and files. Idempotent."""
        for ring in self._rings:
            self._user.ring_stopped(ring)
            ring.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _dispatch(self, message: Message) -> bytes | None:
        payload = message.payload
        match message.envelope.request:
            case Request.GET_FEATURES:
                return protocol.reply_u64(Request.GET_FEATURES, FEATURES)
            case Request.GET_PROTOCOL_FEATURES:
                return protocol.reply_u64(Request.GET_PROTOCOL_FEATURES, PROTOCOL_FEATURES)
            case Request.GET_QUEUE_NUM:
                return protocol.reply_u64(Request.GET_QUEUE_NUM, len(self._rings))
            case Request.GET_CONFIG:
                return protocol.reply_config(payload, self._config)
            case Request.SET_CONFIG:
                raise GuestProtocolError("the guest writes to vsock's read-only configuration space")
            case Request.SET_FEATURES:
                self._set_features(protocol.parse_u64(payload))
            case Request.SET_PROTOCOL_FEATURES:
                self._protocol_features = _subset(protocol.parse_u64(payload), PROTOCOL_FEATURES)
            case Request.SET_OWNER | Request.RESET_OWNER:
                pass
            case Request.SET_MEM_TABLE:
                self._set_memory(message)
            case Request.GET_VRING_BASE:
                ring = self._ring(protocol.parse_ring_state(payload)[0])
                self._user.ring_stopped(ring)
                return protocol.reply_ring_state(ring.index, ring.stop())
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_doorbell(message)
            case _:
                self._set_ring(message.envelope.request, payload)
        return None

    def _set_features(self, features: int) -> None:
        _subset(features, FEATURES)
        if not features & _F_PROTOCOL_FEATURES:
            # Without the feature there is no SET_VRING_ENABLE, and rings are enabled from the start.
            for ring in self._rings:
                ring.enable(True)
                self._run(ring)

    def _set_memory(self, message: Message) -> None:
        regions = protocol.parse_memory_table(message.payload)
        memory = self._open_memory(regions, message.files)
        for ring in self._rings:
            ring.halt()
        if self._memory is not None:
            self._memory.close()
        self._memory = memory
        for ring in self._rings:
            self._run(ring)

    def _set_ring(self, request: Request, payload: bytes) -> None:
        if request is Request.SET_VRING_ADDR:
            addresses = protocol.parse_ring_addresses(payload)
            ring = self._ring(addresses.index)
            ring.set_addresses(addresses)
        else:
            index, number = protocol.parse_ring_state(payload)
            ring = self._ring(index)
            if request is Request.SET_VRING_NUM:
                ring.set_size(number)
            elif request is Request.SET_VRING_BASE:
                ring.set_base(number)
            elif number:
                ring.enable(True)
            else:
                self._user.ring_stopped(ring)
                ring.enable(False)
        self._run(ring)

    def _set_doorbell(self, message: Message) -> None:
        value = protocol.parse_u64(message.payload)
        ring = self._ring(value & 0xFF)
        request = message.envelope.request
        file = -1 if value & protocol.NO_FILE else message.take_file()
        if request is Request.SET_VRING_CALL:
            ring.set_call(file)
        elif request is Request.SET_VRING_KICK:
            self._user.ring_stopped(ring)
            ring.halt()
            ring.set_kick(file)
            self._run(ring)
        elif file >= 0:
            # The error doorbell: errors end the VM here, so that nobody would ring it.
            message.files.append(file)

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise GuestProtocolError(f"virtqueue {index} was named, there are {len(self._rings)}")
        return self._rings[index]

    def _run(self, ring: Ring) -> None:
        if ring.run(self._memory):
            self._user.ring_started(ring)
            ring.fresh = False


def _subset(features: int, offered: int) -> int:
    if features & ~offered:
        raise GuestProtocolError(f"features {features & ~offered:#x} were acknowledged without an offer")
    return features
