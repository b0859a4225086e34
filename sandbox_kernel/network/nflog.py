"""Netlink's packet log, in which the filter notes what it refuses: messages out and in, without I/O.

Formats: include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nfnetlink_log.h; IP by RFC 791 and RFC
8200. The packet is the guest's: of its bytes nothing is believed but their number.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NETLINK_NETFILTER = 12

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_PACKET, _CONFIG = 4 << 8 | 0, 4 << 8 | 1  # NFNL_SUBSYS_ULOG
_REQUEST, _ACK = 1, 4
_CFG_CMD, _CFG_MODE, _CFG_THRESHOLD = 1, 2, 5
_BIND, _COPY_PACKET = 1, 2
_PAYLOAD, _PREFIX = 9, 10
_TYPE = 0x3FFF
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_NAMES = {_TCP: "tcp", _UDP: "udp", _ICMP: "icmp", _ICMPV6: "icmp"}
_MOST = 64
"""Messages that are looked at in one datagram."""


@dataclass(frozen=True)
class Refused:
    """A packet that was not let through.

    Attributes:
        why: the rule's note.
        address: where it was to go.
        protocol: `tcp`, `udp`, `icmp`, or the number of another.
        port: its destination's; 0 for none.
    """

    why: str
    address: str
    protocol: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return f"{self.address} ({self.protocol})"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port} ({self.protocol})"


def subscribe(group: int, snap: int) -> bytes:
    """The messages by which a socket gets a group's packets, `snap` bytes of each."""
    bind = _attribute(_CFG_CMD, struct.pack("=B", _BIND))
    mode = _attribute(_CFG_MODE, struct.pack(">IBx", snap, _COPY_PACKET))
    at_once = _attribute(_CFG_THRESHOLD, struct.pack(">I", 1))
    return _message(group, bind) + _message(group, mode) + _message(group, at_once)


def read(datagram: bytes) -> Iterator[Refused]:
    """The packets in what a socket has received."""
    place = 0
    for _ in range(_MOST):
        if len(datagram) - place < _HEADER.size:
            return
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, place)
        if not _HEADER.size <= length <= len(datagram) - place:
            return
        if kind == _PACKET:
            found = _refused(datagram[place + _HEADER.size + _GENERIC.size : place + length])
            if found is not None:
                yield found
        place += (length + 3) & ~3


def _refused(attributes: bytes) -> Refused | None:
    found: dict[int, bytes] = {}
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if not _ATTRIBUTE.size <= length <= len(attributes):
            break
        found[kind & _TYPE] = attributes[_ATTRIBUTE.size : length]
        attributes = attributes[(length + 3) & ~3 :]
    packet = _destination(found.get(_PAYLOAD, b""))
    if packet is None:
        return None
    why = found.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
    return Refused(why, *packet)


def _destination(packet: bytes) -> tuple[str, str, int] | None:
    """Address, protocol and port that a packet is for; None when it is none of IP's."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        address = str(ipaddress.IPv4Address(packet[16:20]))
        protocol, rest = packet[9], packet[(packet[0] & 15) * 4 :]
        if int.from_bytes(packet[6:8], "big") & 0x1FFF:
            rest = b""  # not the first fragment
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        address = str(ipaddress.IPv6Address(packet[24:40]))
        protocol, rest = packet[6], packet[40:]
    else:
        return None
    port = int.from_bytes(rest[2:4], "big") if protocol in (_TCP, _UDP) and len(rest) >= 4 else 0
    return address, _NAMES.get(protocol, str(protocol)), port


def _message(group: int, attributes: bytes) -> bytes:
    body = struct.pack("=BB", 0, 0) + struct.pack(">H", group) + attributes  # a number of the network's
    return _HEADER.pack(_HEADER.size + len(body), _CONFIG, _REQUEST | _ACK, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    padded = value + bytes(-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + padded
