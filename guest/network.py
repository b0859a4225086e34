"""The guest's network device: found, given addresses, a way out and a DNS server (netdevice(7), ipv6(7)).

It is there while a template is made, and so in its clones, or comes after a boot, if at all. What it may
reach is decided on the host.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import time

import fields
import system
from fields import Request

_NAME = "eth0"
"""Linux' name for the only device there can be; nobody here gives it another."""
_RESCAN = "/sys/bus/pci/rescan"
_RESOLVER = "/etc/resolv.conf"
_SECONDS = 10.0
_LOOK = 0.005
_LONGEST_ADDRESS = 45
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
_UP_RUNNING = 0x41
_RTF_UP_GATEWAY = 0x3


class Link:
    """What the host says of one version of IP: `address`, `prefix` (bits of its network), `gateway`."""

    __slots__ = ("address", "gateway", "prefix")

    def __init__(self, family: int, request: Request) -> None:
        """Raises ValueError over a field that makes no sense."""
        bits = 32 if family == socket.AF_INET else 128
        self.prefix = fields.integer(request, "prefix", 1, bits)
        try:
            self.address = socket.inet_pton(family, fields.text(request, "address", _LONGEST_ADDRESS))
            self.gateway = socket.inet_pton(family, fields.text(request, "gateway", _LONGEST_ADDRESS))
        except OSError as error:
            raise ValueError(f"network has an address that is none: {error}") from error


class Network:
    """The field `network` of a configuration."""

    def __init__(self, request: Request) -> None:
        """Raises ValueError over a field that makes no sense; nothing has been changed then."""
        self._four = Link(socket.AF_INET, fields.mapping(request, "ipv4"))
        self._six = Link(socket.AF_INET6, fields.mapping(request, "ipv6"))

    def use(self) -> None:
        """Brings the device up.

        Raises:
            OSError: it does not come, or Linux refuses.
        """
        index = _find()
        device = _NAME.encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four:
            mask = ((1 << 32) - (1 << (32 - self._four.prefix))).to_bytes(4, "big")
            fcntl.ioctl(four, _SIOCSIFADDR, struct.pack("16s16s8x", device, _address(self._four.address)))
            fcntl.ioctl(four, _SIOCSIFNETMASK, struct.pack("16s16s8x", device, _address(mask)))
            fcntl.ioctl(four, _SIOCSIFFLAGS, struct.pack("16sH22x", device, _UP_RUNNING))
            fcntl.ioctl(four, _SIOCADDRT, _route(self._four.gateway))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
            fcntl.ioctl(six, _SIOCSIFADDR, struct.pack("=16sIi", self._six.address, self._six.prefix, index))
            fcntl.ioctl(six, _SIOCADDRT, _route_of_six(self._six.gateway, index))
        with open(_RESOLVER, "w") as file:
            file.write(
                f"nameserver {socket.inet_ntop(socket.AF_INET, self._four.gateway)}\n"
                "options timeout:3 attempts:2\n"
            )


def _find() -> int:
    """The device's index, when it is there."""
    deadline = time.monotonic() + _SECONDS
    rescanned = False
    while True:
        try:
            return socket.if_nametoindex(_NAME)
        except OSError:
            if time.monotonic() > deadline:
                raise
        if not rescanned:
            rescanned = True
            system.write(_RESCAN, "1")  # it was plugged in when Linux was up
        time.sleep(_LOOK)


def _address(four: bytes) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, four)


def _route(gateway: bytes) -> bytes:
    """struct rtentry: everything that nothing else is known of goes to the gateway."""
    nobody = _address(b"\0\0\0\0")
    return struct.pack(
        "@L16s16s16sHhLPhPLLH", 0, nobody, _address(gateway), nobody, _RTF_UP_GATEWAY, 0, 0, 0, 1, 0, 0, 0, 0
    )


def _route_of_six(gateway: bytes, index: int) -> bytes:
    """struct in6_rtmsg, likewise."""
    return struct.pack("@16s16s16sIHHILIi", b"", b"", gateway, 0, 0, 0, 1, 0, _RTF_UP_GATEWAY, index)
