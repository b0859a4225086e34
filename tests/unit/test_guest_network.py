"""What the agent believes of a network that the host describes."""

from __future__ import annotations

import copy
import socket
import struct
from typing import Any

import pytest

import network
from sandbox_kernel.agent.client import Configuration
from sandbox_kernel.network.addresses import LINKS, V4, V6


def test_what_the_host_says_is_understood() -> None:
    network.Network(copy.deepcopy(LINKS))
    link = network.Link(socket.AF_INET, dict(LINKS["ipv4"]))
    assert (link.address, link.gateway, link.prefix) == (
        socket.inet_aton(V4.guest),
        socket.inet_aton(V4.gateway),
        30,
    )
    six = network.Link(socket.AF_INET6, dict(LINKS["ipv6"]))
    assert (six.address, six.prefix) == (socket.inet_pton(socket.AF_INET6, V6.guest), 64)


def test_the_hosts_configuration_has_it_where_there_is_one() -> None:
    assert "network" not in Configuration(1, "name", b"", 100).fields()
    assert Configuration(1, "name", b"", 100, network=LINKS).fields()["network"] == LINKS


@pytest.mark.parametrize(
    ("version", "field", "value", "words"),
    [
        ("ipv4", "prefix", 0, "prefix is a number from 1 to 32"),
        ("ipv4", "prefix", 33, "prefix is a number from 1 to 32"),
        ("ipv6", "prefix", 129, "prefix is a number from 1 to 128"),
        ("ipv4", "prefix", True, "prefix is a number from 1 to 32"),
        ("ipv4", "prefix", "24", "prefix is a number from 1 to 32"),
        ("ipv4", "address", 1, "address is a text of 1 to 45 characters"),
        ("ipv4", "address", "", "address is a text of 1 to 45 characters"),
        ("ipv6", "gateway", "1" * 46, "gateway is a text of 1 to 45 characters"),
        ("ipv4", "address", "1.2.3", "network has an address that is none: "),
        ("ipv4", "gateway", "fd00::1", "network has an address that is none: "),
        ("ipv6", "gateway", "1.2.3.4", "network has an address that is none: "),
        ("ipv6", "address", "fe80::1%1", "network has an address that is none: "),
        ("ipv4", "address", None, "address is a text of 1 to 45 characters"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(version: str, field: str, value: object, words: str) -> None:
    request: dict[str, Any] = copy.deepcopy(LINKS)
    request[version][field] = value
    with pytest.raises(ValueError) as caught:
        network.Network(request)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("request_", [{}, {"ipv4": LINKS["ipv4"]}, {"ipv4": [], "ipv6": LINKS["ipv6"]}])
def test_both_versions_of_ip_are_described(request_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ipv[46] is an object"):
        network.Network(request_)


def test_routes_have_the_size_that_linux_reads() -> None:
    assert len(network._address(b"\1\2\3\4")) == 16
    route = network._route(b"\1\2\3\4")
    assert len(route) == 114  # struct rtentry, to its last field
    assert struct.unpack_from("=HH4s", route, 24) == (socket.AF_INET, 0, b"\1\2\3\4")
    six = network._route_of_six(bytes(range(16)), 7)
    assert len(six) == 80  # struct in6_rtmsg
    assert six[32:48] == bytes(range(16))
    assert struct.unpack_from("=i", six, 76) == (7,)


def test_a_device_that_does_not_come_is_an_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rescan = tmp_path / "rescan"
    rescan.touch()
    monkeypatch.setattr(network, "_NAME", "sandboxed0")
    monkeypatch.setattr(network, "_RESCAN", str(rescan))
    monkeypatch.setattr(network, "_SECONDS", 0.05)
    with pytest.raises(OSError, match=r"No such device|no interface"):
        network._find()
    assert rescan.read_text() == "1"
    monkeypatch.setattr(network, "_NAME", "lo")
    assert network._find() == socket.if_nametoindex("lo")
