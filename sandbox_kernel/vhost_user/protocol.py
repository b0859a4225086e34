"""Messages of the vhost-user protocol (QEMU, docs/interop/vhost-user.rst, "Message Specification").

Theory of operation. A message is a header of three 32-bit numbers (request, flags, size), `size` bytes of
payload, and file descriptors that came with the header. The front-end (QEMU) asks; some requests have a
reply with the same number, and with the REPLY_ACK feature any other may ask for one that says 0 for success.

The front-end is not trusted: a hostile guest may have taken it over. Sizes are bounded by the largest
message that is understood, counts by the payload that is there, and a payload must have exactly the size
that its request wants. Whatever does not fit is a `GuestProtocolError`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.virtio.memory import MAX_REGIONS, Region

HEADER_SIZE: Final = 12
MAX_PAYLOAD: Final = 8 + 32 * MAX_REGIONS
"""The memory table is the largest message that is understood, configuration space (at most 256) included."""
MAX_FILES: Final = MAX_REGIONS

NO_FILE: Final = 1 << 8
"""In SET_VRING_KICK and SET_VRING_CALL: no file descriptor comes along."""

_HEADER: Final = struct.Struct("<III")
_U64: Final = struct.Struct("<Q")
_PAIR: Final = struct.Struct("<II")
_ADDRESSES: Final = struct.Struct("<IIQQQQ")
_REGION: Final = struct.Struct("<QQQQ")
_CONFIG: Final = struct.Struct("<III")
_VERSION_MASK: Final = 3
_VERSION: Final = 1
_REPLY: Final = 1 << 2
_NEED_REPLY: Final = 1 << 3


class Request(enum.IntEnum):
    """The requests that are understood ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


@dataclass(frozen=True)
class Envelope:
    """A message's header.

    Attributes:
        request: what is asked.
        size: bytes of payload that follow, at most `MAX_PAYLOAD`.
        need_reply: the front-end wants an acknowledgement (if REPLY_ACK was negotiated).
    """

    request: Request
    size: int
    need_reply: bool


@dataclass(frozen=True)
class RingAddresses:
    """Payload of SET_VRING_ADDR ("A vring address description"); addresses are the front-end's own."""

    index: int
    descriptors: int
    used: int
    available: int


def parse_header(data: bytes) -> Envelope:
    """Read a header of exactly `HEADER_SIZE` bytes.

    Raises:
        GuestProtocolError: wrong version, unknown request or oversized payload.
    """
    number, flags, size = _unpack(_HEADER, data)
    if flags & _VERSION_MASK != _VERSION or flags & _REPLY:
        raise GuestProtocolError(f"vhost-user flags {flags:#x} are not those of a request of version 1")
    try:
        request = Request(number)
    except ValueError:
        raise GuestProtocolError(f"vhost-user request {number} was not negotiated") from None
    if size > MAX_PAYLOAD:
        raise GuestProtocolError(f"a vhost-user message of {size} bytes is larger than {MAX_PAYLOAD}")
    return Envelope(request, size, bool(flags & _NEED_REPLY))


def parse_u64(payload: bytes) -> int:
    """A single 64-bit number."""
    (value,) = _unpack(_U64, payload)
    return value


def parse_ring_state(payload: bytes) -> tuple[int, int]:
    """A ring's index and a number ("A vring state description")."""
    index, number = _unpack(_PAIR, payload)
    return index, number


def parse_ring_addresses(payload: bytes) -> RingAddresses:
    """Where a ring's three arrays are. Flags and log are ignored: no logging is offered."""
    index, _flags, descriptors, used, available, _log = _unpack(_ADDRESSES, payload)
    return RingAddresses(index, descriptors, used, available)


def parse_memory_table(payload: bytes) -> list[Region]:
    """The rows of SET_MEM_TABLE ("Multiple memory regions description").

    Raises:
        GuestProtocolError: too many rows, a size that does not match them, or a bad row.
    """
    if len(payload) < 8:
        raise GuestProtocolError(f"a memory table of {len(payload)} bytes has no header")
    count, _padding = _PAIR.unpack_from(payload)
    if count > MAX_REGIONS or len(payload) < 8 + _REGION.size * count:
        raise GuestProtocolError(f"a memory table of {count} regions in {len(payload)} bytes")
    rows = (_REGION.unpack_from(payload, 8 + _REGION.size * i) for i in range(count))
    return [Region(guest, size, user, offset) for guest, size, user, offset in rows]


def reply(request: Request, payload: bytes) -> bytes:
    """A reply to `request`."""
    return _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


def reply_u64(request: Request, value: int) -> bytes:
    """A reply that is one 64-bit number; also the form of an acknowledgement."""
    return reply(request, _U64.pack(value))


def reply_ring_state(index: int, base: int) -> bytes:
    """The reply to GET_VRING_BASE."""
    return reply(Request.GET_VRING_BASE, _PAIR.pack(index, base))


def reply_config(payload: bytes, config: bytes) -> bytes:
    """The reply to GET_CONFIG: as much of the configuration space as was asked for.

    A request that leaves the space gets the empty payload by which the protocol tells an error.
    """
    if len(payload) < _CONFIG.size:
        raise GuestProtocolError(f"a request for configuration space of {len(payload)} bytes has no header")
    offset, size, flags = _CONFIG.unpack_from(payload)
    if offset + size > len(config):
        return reply(Request.GET_CONFIG, b"")
    return reply(Request.GET_CONFIG, _CONFIG.pack(offset, size, flags) + config[offset : offset + size])


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise GuestProtocolError(f"a vhost-user payload has {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)
