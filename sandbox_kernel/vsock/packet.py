"""The header of a vsock packet (virtio 1.2, 5.10.6).

Theory of operation. A packet is a header of 44 bytes and, for RW alone, `length` bytes of payload. Each
header repeats the sender's view of flow control: `buf_alloc`, the bytes it can buffer for this stream, and
`fwd_cnt`, the bytes its application has taken so far, modulo 2**32.

    src_cid u64 · dst_cid u64 · src_port u32 · dst_port u32 · len u32 · type u16 · op u16 · flags u32
    · buf_alloc u32 · fwd_cnt u32                                                   (little-endian)
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from sandbox_kernel.errors import GuestProtocolError

LAYOUT: Final = struct.Struct("<QQIIIHHIII")
SIZE: Final = LAYOUT.size
MAX_PAYLOAD: Final = 64 * 1024
"""Largest payload of a packet, in bytes; Linux's vsock sends and accepts no more."""

HOST_CID: Final = 2
STREAM: Final = 1
"""The packet type of stream sockets, the only one offered."""

REQUEST: Final = 1
RESPONSE: Final = 2
RST: Final = 3
SHUTDOWN: Final = 4
RW: Final = 5
CREDIT_UPDATE: Final = 6
CREDIT_REQUEST: Final = 7

SHUTDOWN_RECEIVE: Final = 1
"""SHUTDOWN flag: its sender will receive no more."""
SHUTDOWN_SEND: Final = 2
"""SHUTDOWN flag: its sender will send no more."""
SHUTDOWN_BOTH: Final = SHUTDOWN_RECEIVE | SHUTDOWN_SEND


class Header(NamedTuple):
    """The fields of a header, as on the wire (virtio 1.2, 5.10.6, `struct virtio_vsock_hdr`)."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    operation: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def parse(data: bytes | bytearray | memoryview) -> Header:
    """Read the header at the beginning of `data`.

    Raises:
        GuestProtocolError: there are fewer than 44 bytes.
    """
    if len(data) < SIZE:
        raise GuestProtocolError(f"a vsock packet of {len(data)} bytes has no room for a header of {SIZE}")
    return Header._make(LAYOUT.unpack_from(data))


def pack(header: Header) -> bytes:
    """The 44 bytes of a header whose fields fit their widths."""
    return LAYOUT.pack(*header)
