"""An allowlist lets through what it names, and nothing else, whatever the guest tries."""

from __future__ import annotations

import time

import pytest

from tests.network.conftest import World

REFUSED = "ConnectionRefusedError"


@pytest.fixture(autouse=True)
def listed(world: World) -> None:
    world.policy("allowlist", ("example.org", "*.wild.net:443", "203.0.113.0/24:443,5000-5001/tcp"))


def test_a_name_that_is_listed_is_reached_on_the_ports_that_are(world: World) -> None:
    assert world.value("reach('example.org', 443)") == "93.184.216.34 443"
    assert world.value("reach('a.wild.net', 443)") == "151.101.0.1 443"
    assert world.value("reach('a.wild.net', 22)") == REFUSED
    assert world.value("reach('203.0.113.7', 5000)") == "203.0.113.7 5000"
    assert world.value("reach('203.0.113.7', 8080)") == REFUSED
    assert world.value("echo('203.0.113.7', 5000)") != True  # noqa: E712


def test_a_name_that_is_not_listed_is_not_resolved_nor_asked_for(world: World) -> None:
    for name in ("other.org", "wild.net", "www.example.org", "example.org.other.org"):
        assert world.value(f"look_up({name!r})") == "gaierror"
        assert f" {name} from" not in world.asked()


def test_an_address_is_reached_only_after_its_name_was_resolved(world: World) -> None:
    assert world.value("reach('151.101.0.2', 443)") == REFUSED
    assert world.value("look_up('b.wild.net')") == ["151.101.0.2"]
    assert world.value("reach('151.101.0.2', 443)") == "151.101.0.2 443"


def test_a_direct_address_is_refused_at_once_and_told_once_in_a_cell(world: World) -> None:
    said = world.run(
        """
        before = time.time()
        print([reach('93.184.216.99', 443) for _ in range(3)], time.time() - before < 5)
        """
    )
    assert f"['{REFUSED}', '{REFUSED}', '{REFUSED}'] True" in said
    assert said.count("The network policy (allowlist) refused 93.184.216.99:443 (tcp)") == 1
    [noted, *_] = [each for each in world.refusals() if each["destination"] == "93.184.216.99:443 (tcp)"]
    assert noted["rule"] == "unlisted"
    assert noted["cell"]
    assert time.time() - noted["time"] < 60


def test_another_dns_server_is_not_reached_by_udp_nor_tcp_nor_tls_nor_https(world: World) -> None:
    assert world.value("ask('8.8.8.8', 'example.org')") != 0
    assert world.value("ask('8.8.8.8', 'example.org', tcp=True)") == REFUSED
    assert world.value("reach('8.8.8.8', 853)") == REFUSED
    assert world.value("reach('8.8.8.8', 443)") == REFUSED
    assert world.value("ask('203.0.113.53', 'example.org', tcp=True)") == REFUSED
    assert world.value("ask('198.18.1.3', 'other.org')") != 0


def test_a_tunnel_through_dns_ends_at_the_resolver(world: World) -> None:
    world.run(
        """
        for number in range(50): look_up(f'secret{number}.tunnel.other.org')
        ask('198.18.0.1', 'x' * 60 + '.' + 'y' * 60 + '.other.org', tcp=True)
        """
    )
    assert "tunnel.other.org" not in world.asked()
    assert "yyy.other.org" not in world.asked()


def test_questions_to_an_allowed_name_are_bounded_in_rate(world: World) -> None:
    before = world.asked().count("tunnel.wild.net from")
    world.run(
        """
        import struct
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for number in range(3000):
            name = f'n{number}.tunnel.wild.net'
            labels = b''.join(bytes([len(each)]) + each.encode() for each in name.split('.'))
            question = struct.pack('>HHHHHH', number, 256, 1, 0, 0, 0) + labels + struct.pack('>BHH', 0, 1, 1)
            asker.sendto(question, ('198.18.0.1', 53))
        time.sleep(2)
        """
    )
    assert world.asked().count("tunnel.wild.net from") - before < 2500
    assert any(each["rule"] == "dns-rate" for each in world.refusals())
    time.sleep(3)
    assert world.value("look_up('example.org')") != "gaierror"


@pytest.mark.parametrize("name", ["rebound.wild.net", "loop.wild.net"])
def test_an_answer_that_points_into_a_private_network_is_not_passed_on(world: World, name: str) -> None:
    assert world.value(f"look_up({name!r})") == "gaierror"
    assert any(each["rule"] == "rebinding" and each["destination"] == name for each in world.refusals())


def test_ipv6_is_no_way_around(world: World) -> None:
    assert world.value("reach('2606:2800::99', 443)") == REFUSED
    assert world.value("ask('2606:2800::53', 'example.org', tcp=True)") == REFUSED
    for address in ("fd00::2", "fd00::3", "fd53:4b::1", "::ffff:93.184.216.99", "64:ff9b::5db8:d863"):
        assert world.value(f"reach({address!r}, 22)") in (REFUSED, "OSError"), address
    assert world.value("look_up('example.org')") == ["2606:2800::34", "93.184.216.34"]
    assert world.value("reach('2606:2800::34', 443)") == "2606:2800::34 443"


def test_a_policy_is_changed_on_a_running_kernel_and_open_connections_are_judged_anew(world: World) -> None:
    world.run(
        """
        held = socket.create_connection(('example.org', 443), 10)
        held.recv(99); held.sendall(b'a'); held.recv(9)
        """
    )
    world.policy("allowlist", ("93.184.216.99",))
    assert world.value("reach('93.184.216.99', 443)") == "93.184.216.99 443"
    said = world.run(
        """
        held.settimeout(20)
        try:
            held.sendall(b'b'); print(held.recv(9))
        except OSError as error:
            print(type(error).__name__)
        """
    )
    assert said.endswith("ConnectionResetError")
    assert world.value("look_up('example.org')") == "gaierror"


def test_a_rule_that_is_none_changes_nothing(world: World) -> None:
    with pytest.raises(RuntimeError, match="ConfigurationError: 'http://x' is no network rule"):
        world.policy("allowlist", ("http://x",))
    assert world.value("reach('example.org', 443)") == "93.184.216.34 443"


def test_no_more_connections_than_the_limit_are_open_at_a_time(world: World) -> None:
    world.policy("allowlist", ("203.0.113.0/24",), network_connections=5)
    said = world.run(
        """
        held, refused = [], 0
        for _ in range(12):
            try: held.append(socket.create_connection(('203.0.113.7', 5000), 10))
            except OSError: refused += 1
        print(len(held), refused)
        for each in held: each.close()
        """
    )
    assert said.endswith("5 7")
    assert any(each["rule"] == "connections" for each in world.refusals())
    world.policy("allowlist", network_connections=256)


def test_bytes_pass_no_faster_than_the_limit(world: World) -> None:
    world.policy("allowlist", ("203.0.113.0/24", "198.51.100.7"), network_bandwidth=0.25)
    world.run(
        """
        from urllib.request import urlopen
        before = time.time()
        fetched = len(urlopen('http://198.51.100.7/1000000').read())
        took = time.time() - before
        """
    )
    took = world.value("(fetched, took)")
    world.policy("allowlist", network_bandwidth=0)
    assert took[0] == 1_000_000
    assert took[1] > 3
