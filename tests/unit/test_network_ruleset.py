"""The packet filter as text: what nft(8) takes, and in which order it judges."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from network_inside import Inside, inside

from sandbox_kernel.network.addresses import V4, V6
from sandbox_kernel.network.ruleset import refresh, ruleset, set_name
from sandbox_kernel.policy import Policy, policy

RULES = ("x.org", "*.x.org:443", "x.org/icmp", "10.1.0.0/16:5432,6000-6100/tcp", "1.2.3.4", "0.0.0.0/0")
RULES += ("[2001:db8::/32]:443", "fd00::/8/udp", "::/0/icmp", "9.9.9.9/udp", "x.org:1-100,50,50,100-200")
MANY = tuple(f"{port}-{port + 5}" for port in range(1000, 1080, 10))


@pytest.fixture(scope="module")
def place() -> Iterator[Inside]:
    with inside() as made:
        yield made


def lines(found: Policy, chain: str) -> list[str]:
    """What stands in a chain."""
    _, _, rest = ruleset(found, 1).partition(f"  chain {chain} {{")
    return [line.strip() for line in rest.partition("\n  }")[0].splitlines()]


@pytest.mark.parametrize("mode", ["allowlist", "public", "full"])
@pytest.mark.parametrize("services", [(), ("80:8080", "80", "443:80")])
@pytest.mark.parametrize(
    ("allow", "deny"), [((), ()), ((), RULES), (RULES, ()), *(((r,), (r,)) for r in RULES)]
)
def test_the_filter_of_a_policy_is_taken_by_nft(
    place: Inside, mode: str, services: tuple[str, ...], allow: tuple[str, ...], deny: tuple[str, ...]
) -> None:
    assert place.nft(ruleset(policy(mode, allow, deny, services), 7), "-c") == ""


@pytest.mark.parametrize("ports", ["", ":443", ":80,443", ":" + ",".join(MANY[:4])])
def test_as_many_rules_as_there_may_be_fit(place: Inside, ports: str) -> None:
    names = [f"name{number}.example{ports}" for number in range(64)]
    networks = [f"10.{number}.0.0/16{ports}" for number in range(64)]
    services = [str(port) for port in range(1000, 1016)]
    for allow, deny in ((names, networks), (networks, networks), (names, names)):
        assert place.nft(ruleset(policy("allowlist", allow, deny, services), 1)) == ""


def test_as_many_ports_as_there_may_be_fit(place: Inside) -> None:
    ports = ",".join(f"{port}-{port + 5}" for port in range(1000, 1320, 10))
    names = [f"name{number}.example:{ports}" for number in range(8)]
    networks = [f"[fd00:{number}::/32]:{ports}/udp" for number in range(8)]
    assert place.nft(ruleset(policy("public", names, networks), 1)) == ""


network = st.sampled_from([rule for rule in RULES if rule[0] in "0123456789[f:"])
rules = st.lists(st.one_of(st.sampled_from(RULES), network), max_size=6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["allowlist", "public", "full"]),
    rules,
    rules,
    st.integers(1, 65536),
    st.integers(1, 2**31),
)
def test_any_policy_gives_a_filter(
    place: Inside, mode: str, allow: list[str], deny: list[str], connections: int, generation: int
) -> None:
    found = policy(mode, allow, deny, (), connections)
    assert place.nft(ruleset(found, generation), "-c") == ""


def test_one_filter_takes_the_place_of_another(place: Inside) -> None:
    assert place.nft(ruleset(policy("allowlist", ["x.org"]), 1)) == ""
    assert place.nft(refresh({"n0v4g1": {"1.2.3.4"}})) == ""
    assert place.nft(ruleset(policy("allowlist", ["y.org"]), 2)) == ""
    assert place.addresses("n0v4g2") == set()
    tables = place.run("nft", "list", "tables").stdout.split("\n")
    assert sorted(filter(None, tables)) == ["table inet sandbox", "table netdev sandbox"]
    assert "ct mark 0x00000002" in place.run("nft", "list", "ruleset").stdout


def test_a_new_life_is_for_addresses_that_are_there_or_not(place: Inside) -> None:
    assert place.nft(ruleset(policy("allowlist", ["x.org"]), 1)) == ""
    both = {"n0v4g1": {"1.2.3.4", "1.2.3.5"}, "n0v6g1": {"2001:db8::1"}}
    for _ in range(2):
        assert place.nft(refresh(both)) == ""
        assert place.addresses("n0v4g1") == {"1.2.3.4", "1.2.3.5"}
        assert place.addresses("n0v6g1") == {"2001:db8::1"}


def test_no_address_is_no_reason_to_fail(place: Inside) -> None:
    assert place.nft(refresh({})) == ""


def test_a_set_is_of_one_policy_alone() -> None:
    assert set_name(3, 6, 4) == "n3v6g4" != set_name(3, 6, 5)
    assert "set n0v4g9 {" in ruleset(policy("allowlist", ["x.org"]), 9)


@pytest.mark.parametrize("mode", ["allowlist", "public", "full"])
def test_what_is_denied_is_judged_before_what_is_allowed(mode: str) -> None:
    judged = lines(policy(mode, ["10.0.0.0/8", "x.org"], ["10.1.0.0/16:80/tcp", "y.org", "8.8.8.8"]), "judge")
    denied = [judged.index(f"ip daddr {which}") for which in (
        "10.1.0.0/16 meta l4proto tcp th dport 80 goto denied0", "8.8.8.8/32  goto denied2")]  # fmt: skip
    allowed = [number for number, line in enumerate(judged) if line.endswith(("goto pass", "jump allowed1"))]
    assert max(denied) < min(allowed)


def test_a_denied_network_is_denied_for_each_protocol_unless_one_is_named() -> None:
    judged = lines(policy("full", (), ["8.8.8.8", "8.8.4.4/udp", "9.9.9.9:53", "1.1.1.1/icmp"]), "judge")
    assert [line for line in judged if "denied" in line] == [
        "ip daddr 8.8.8.8/32  goto denied0",
        "ip daddr 8.8.4.4/32 meta l4proto udp goto denied1",
        "ip daddr 9.9.9.9/32 meta l4proto @usual th dport 53 goto denied2",
        "ip daddr 1.1.1.1/32 meta l4proto { icmp, icmpv6 } goto denied3",
    ]


def places(found: Policy) -> dict[str, int]:
    """Where something is decided first."""
    judged = lines(found, "judge")
    return {
        word: next(number for number, line in enumerate(judged) if re.search(pattern, line))
        for word, pattern in {
            "host": rf"ip daddr {re.escape(V4.uplink)}",
            "dns": r"th dport \{ 53,",
            "network": r"ip daddr 10\.0\.0\.0/8 meta .* goto pass",
            "private": r"ip daddr \{ 0\.0\.0\.0/8",
            "name": r"ip daddr @n1v4g1",
        }.items()
    }


@pytest.mark.parametrize("mode", ["allowlist", "public"])
def test_a_private_address_is_reached_by_a_network_and_never_by_a_name(mode: str) -> None:
    place = places(policy(mode, ["10.0.0.0/8", "x.org"]))
    assert place["host"] < place["dns"] < place["network"] < place["private"] < place["name"]


@pytest.mark.parametrize("address", [
    *("127.0.0.0/8", "169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    *("168.63.129.16", "224.0.0.0/4", "198.18.0.0/15"),
])  # fmt: skip
def test_what_is_nobodys_own_is_private(address: str) -> None:
    [private] = [line for line in lines(policy("public"), "judge") if "0.0.0.0/8" in line and "log" in line]
    assert f" {address}," in private.replace(" }", ",")


def test_full_lets_through_what_is_private_and_not_what_is_the_hosts() -> None:
    judged = "\n".join(lines(policy("full"), "judge"))
    assert "192.168.0.0/16" not in judged
    assert judged.count(f"ip daddr {V4.uplink}") == judged.count(f"ip6 daddr {V6.uplink}") == 2
    assert judged.endswith("goto pass")


@pytest.mark.parametrize(
    ("mode", "open_at_the_end"), [("allowlist", False), ("public", True), ("full", True)]
)
def test_an_allowlist_alone_refuses_what_nothing_names(mode: str, open_at_the_end: bool) -> None:
    assert (lines(policy(mode), "judge")[-1] == "goto pass") is open_at_the_end
    assert lines(policy(mode), "forward")[-2:] == [
        'limit rate 50/second burst 100 packets log group 1 snaplen 128 prefix "unlisted"',
        "goto refuse",
    ]


def test_a_connection_has_the_mark_of_the_policy_that_let_it_in() -> None:
    text = ruleset(policy("allowlist"), 41)
    assert "ct state established,related ct mark 41 accept" in text
    assert "ct mark set 41 accept" in text


def test_a_service_is_the_only_thing_of_the_host_to_be_reached() -> None:
    found = policy("allowlist", services=["80:8080", "5432"])
    judged = lines(found, "judge")
    assert judged[1] == f"ct status dnat ip daddr {V4.host} tcp dport {{ 8080, 5432 }} goto pass"
    assert lines(found, "services")[1:] == [
        f'iifname "tap0" ip daddr {V4.gateway} tcp dport 80 dnat ip to {V4.host}:8080',
        f'iifname "tap0" ip daddr {V4.gateway} tcp dport 5432 dnat ip to {V4.host}:5432',
    ]
