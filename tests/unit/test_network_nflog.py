"""Netlink's packet log: what Linux sends, and what it would never."""

from __future__ import annotations

import json
import socket
import struct
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from network_inside import inside

from sandbox_kernel.network.nflog import Refused, read, subscribe

KIND = 4 << 8


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def datagram(*attributes: bytes, kind: int = KIND) -> bytes:
    body = b"\0\0\0\1" + b"".join(attributes)
    message = struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body
    return message + bytes(-len(message) % 4)


def ipv4(protocol: int, rest: bytes, options: int = 0, fragment: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45 + options, 0, 0, 0, fragment, 64, protocol, 0)
    return head + bytes([10, 0, 0, 1]) + bytes([93, 184, 216, 34]) + bytes(4 * options) + rest


def ipv6(protocol: int, rest: bytes) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    return struct.pack(">IHBB", 6 << 28, len(rest), protocol, 64) + address + address + rest


PORTS = struct.pack(">HH", 40000, 443)


@pytest.mark.parametrize(
    ("packet", "expected", "words"),
    [
        (ipv4(6, PORTS), ("93.184.216.34", "tcp", 443), "93.184.216.34:443 (tcp)"),
        (ipv4(17, PORTS), ("93.184.216.34", "udp", 443), "93.184.216.34:443 (udp)"),
        (ipv4(6, PORTS, options=10), ("93.184.216.34", "tcp", 443), "93.184.216.34:443 (tcp)"),
        (ipv4(17, PORTS, fragment=9), ("93.184.216.34", "udp", 0), "93.184.216.34 (udp)"),
        (ipv4(17, PORTS, fragment=0x2000), ("93.184.216.34", "udp", 443), "93.184.216.34:443 (udp)"),
        (ipv4(1, PORTS), ("93.184.216.34", "icmp", 0), "93.184.216.34 (icmp)"),
        (ipv4(47, PORTS), ("93.184.216.34", "47", 0), "93.184.216.34 (47)"),
        (ipv4(6, b"\1\2\3"), ("93.184.216.34", "tcp", 0), "93.184.216.34 (tcp)"),
        (ipv6(6, PORTS), ("2001:db8::1", "tcp", 443), "[2001:db8::1]:443 (tcp)"),
        (ipv6(58, PORTS), ("2001:db8::1", "icmp", 0), "2001:db8::1 (icmp)"),
        (ipv6(0, PORTS), ("2001:db8::1", "0", 0), "2001:db8::1 (0)"),
    ],
)
def test_a_packet_is_told_by_where_it_was_to_go(
    packet: bytes, expected: tuple[str, str, int], words: str
) -> None:
    [found] = read(datagram(attribute(1, bytes(4)), attribute(9, packet), attribute(10, b"unlisted\0")))
    assert found == Refused("unlisted", *expected)
    assert str(found) == words


@pytest.mark.parametrize("packet", [b"", b"\x45", ipv4(6, b"")[:19], ipv6(6, b"")[:39], b"\x75" + bytes(60)])
def test_what_is_no_packet_of_ip_is_left_out(packet: bytes) -> None:
    assert list(read(datagram(attribute(9, packet), attribute(10, b"x\0")))) == []


def test_other_messages_are_left_out_and_those_behind_them_are_read() -> None:
    whole = datagram(attribute(9, ipv4(6, PORTS)), attribute(10, b"private\0"))
    assert [each.why for each in read(datagram(b"", kind=2) + whole + whole)] == ["private", "private"]


def test_only_so_many_messages_of_a_datagram_are_looked_at() -> None:
    assert len(list(read(datagram(attribute(9, ipv4(6, PORTS))) * 100))) == 64


GARBAGE = st.recursive(
    st.one_of(st.binary(max_size=80), st.binary(max_size=30).map(lambda rest: ipv4(6, rest))),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from([1, 9, 10, 0x4009]), inner).map(lambda pair: attribute(*pair)),
        inner.map(lambda body: datagram(body)),
        st.tuples(inner, inner).map(b"".join),
        st.tuples(inner, st.integers(0, 90)).map(lambda pair: pair[0][: pair[1]]),
    ),
    max_leaves=8,
)


@given(GARBAGE)
def test_any_datagram_is_read(data: bytes) -> None:
    for found in read(data):
        assert 0 <= found.port <= 65535
        assert len(str(found)) < 80
        assert len(found.why) <= len(data)


LISTENER = textwrap.dedent(
    """
    import socket, sys, json
    from sandbox_kernel.network import nflog
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, nflog.NETLINK_NETFILTER) as log:
        log.bind((0, 0))
        log.send(nflog.subscribe(7, 64))
        log.settimeout(20)
        for address, port, kind in (("127.0.0.1", 99, 1), ("127.0.0.2", 98, 2), ("::1", 97, 1)):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, kind) as sender:
                sender.setblocking(False)
                try:
                    sender.connect((address, port))
                    sender.send(b"x" * 500)
                except OSError:
                    pass
            found = []
            while not found:
                found = list(nflog.read(log.recv(65536)))
            print(json.dumps([found[0].why, str(found[0])]))
    """
)


def test_what_linux_notes_is_read() -> None:
    with inside() as place:
        rule = 'th dport 90-99 log group 7 snaplen 64 prefix "deny:3" drop'
        chain = f"chain o {{ type filter hook output priority 0; {rule}; }}"
        assert place.nft(f"table inet t {{ {chain}; }}") == ""
        done = place.run(sys.executable, "-c", LISTENER)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["deny:3", "127.0.0.1:99 (tcp)"],
        ["deny:3", "127.0.0.2:98 (udp)"],
        ["deny:3", "[::1]:97 (tcp)"],
    ]


def test_a_subscription_is_three_requests_of_the_group() -> None:
    place, text = 0, subscribe(258, 128)
    for _ in range(3):
        length, kind, flags, _, _ = struct.unpack_from("=IHHII", text, place)
        assert (kind, flags, text[place + 18 : place + 20]) == (KIND | 1, 5, b"\1\2")
        place += length
    assert place == len(text)
