"""`public` is the internet and nobody's own networks; `full` is all but the host; what is denied stays so."""

from __future__ import annotations

import pytest

from tests.network.conftest import World

REFUSED = "ConnectionRefusedError"
PRIVATE = (
    *("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "127.0.0.2", "0.0.0.1"),
    *("100.100.100.200", "168.63.129.16", "192.0.2.1", "224.0.0.1", "255.255.255.255"),
    *("fc00:1::1", "fe80::1", "ff02::1", "::ffff:10.1.2.3", "2002:a01:203::1", "2001:db8::1"),
)


def test_public_reaches_the_internet_by_name_and_by_address(world: World) -> None:
    world.policy("public")
    assert world.value("reach('other.org', 443)") == "93.184.216.99 443"
    assert world.value("reach('93.184.216.99', 25)") == "93.184.216.99 25"
    assert world.value("echo('93.184.216.99', 5000)") is True


@pytest.mark.parametrize("address", PRIVATE)
def test_public_does_not_reach_what_is_private_or_special(world: World, address: str) -> None:
    world.policy("public")
    assert world.value(f"reach({address!r}, 443, 4)") in (REFUSED, "OSError", "PermissionError"), address


def test_public_has_no_other_dns_server_and_no_rebinding(world: World) -> None:
    world.policy("public")
    assert world.value("ask('8.8.8.8', 'other.org', tcp=True)") == REFUSED
    assert world.value("reach('8.8.8.8', 853)") == REFUSED
    assert world.value("look_up('rebound.example.org')") == "gaierror"


@pytest.mark.parametrize("mode", ["public", "full"])
def test_what_is_denied_is_refused_though_all_else_is_allowed(world: World, mode: str) -> None:
    world.policy(mode, ("93.184.216.0/24",), ("93.184.216.99", "bad.org", "0.0.0.0/0:25"))
    assert world.value("reach('93.184.216.99', 443)") == REFUSED
    assert world.value("reach('93.184.216.34', 25)") == REFUSED
    assert world.value("look_up('bad.org')") == "gaierror"
    assert world.value("reach('93.184.216.34', 443)") == "93.184.216.34 443"
    assert [each["reason"] for each in world.refusals() if each["rule"] == "deny:0"][-1] == (
        "`network_deny` has 93.184.216.99"
    )


def test_full_reaches_private_networks_and_other_dns_servers(world: World) -> None:
    world.policy("full")
    assert world.value("reach('10.1.2.3', 443)") == "10.1.2.3 443"
    assert world.value("reach('169.254.169.254', 443)") == "169.254.169.254 443"
    assert world.value("ask('9.9.9.9', 'other.org', tcp=True)") == 0


@pytest.mark.parametrize("mode", ["allowlist", "public", "full"])
def test_the_host_its_loopback_and_the_uplink_are_not_reached(world: World, mode: str) -> None:
    """Except for the port that `host_services` names, which is there in each mode."""
    if mode == "allowlist":
        assert world.host(
            "[listen('127.0.0.1', 7000), listen('127.0.0.1', 7002), listen('10.200.0.1', 7002)]"
        )
    world.policy(mode, ("198.18.0.0/15", "0.0.0.0/0", "::/0"))
    near = ("198.18.0.1", "198.18.1.2", "198.18.1.3", "198.18.1.100", "fd00::2", "fd00::100")
    for address in (*near, "10.200.0.1", "fd77::1"):
        for port in (7000, 7002, 22):
            assert world.value(f"reach({address!r}, {port}, 4)") in (REFUSED, "OSError"), (address, port)
    assert world.value("look_up('host.internal')") == ["198.18.0.1"]
    assert world.value("reach('host.internal', 7001)") == "the host's 7000"
    assert world.value("reach('127.0.0.1', 7000)") == REFUSED


def test_none_on_a_running_kernel_closes_everything(world: World) -> None:
    world.policy("none")
    assert world.value("reach('93.184.216.34', 443)") == REFUSED
    assert world.value("look_up('example.org')") == "gaierror"
    assert world.value("look_up('host.internal')") == "gaierror"
    world.ask(op="network", network_deny=["bad.org"])
    world.policy("full")
    assert world.value("look_up('host.internal')") == ["198.18.0.1"]
