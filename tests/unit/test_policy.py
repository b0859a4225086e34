"""What a person may write of a network, and what is said about the rest."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.policy import PROTOCOLS, Policy, Rule, Service, parse, policy

USUAL = ("tcp", "udp")


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


ONE_PORT = ((443, 443),)
SEVERAL = ((80, 80), (443, 443), (8000, 8100))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi.org", ("pypi.org", False, None, (), USUAL)),
        ("PyPI.org", ("pypi.org", False, None, (), USUAL)),
        ("*.pythonhosted.org:443", ("pythonhosted.org", True, None, ONE_PORT, USUAL)),
        ("x.org:80,443,8000-8100/tcp", ("x.org", False, None, SEVERAL, ("tcp",))),
        ("x.org/udp", ("x.org", False, None, (), ("udp",))),
        ("x.org/icmp", ("x.org", False, None, (), ("icmp",))),
        ("_srv._tcp.x.org", ("_srv._tcp.x.org", False, None, (), USUAL)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example", False, None, (), USUAL)),
        ("1.pool.ntp.org:443/udp", ("1.pool.ntp.org", False, None, ONE_PORT, ("udp",))),
        ("10.1.0.0/16:80,443,8000-8100/tcp", ("", False, network("10.1.0.0/16"), SEVERAL, ("tcp",))),
        ("10.0.0.0/8", ("", False, network("10.0.0.0/8"), (), USUAL)),
        ("10.0.0.0/8/icmp", ("", False, network("10.0.0.0/8"), (), ("icmp",))),
        ("1.2.3.4:1-65535", ("", False, network("1.2.3.4/32"), ((1, 65535),), USUAL)),
        ("9.9.9.9:443", ("", False, network("9.9.9.9/32"), ONE_PORT, USUAL)),
        ("[2001:db8::/32]:443", ("", False, network("2001:db8::/32"), ONE_PORT, USUAL)),
        ("[::1]:443/tcp", ("", False, network("::1/128"), ONE_PORT, ("tcp",))),
        ("[2001:DB8::]", ("", False, network("2001:db8::/128"), (), USUAL)),
        ("2001:db8::/32", ("", False, network("2001:db8::/32"), (), USUAL)),
        ("2001:db8::/32/udp", ("", False, network("2001:db8::/32"), (), ("udp",))),
        ("::ffff:10.0.0.0/104", ("", False, network("::ffff:10.0.0.0/104"), (), USUAL)),
        ("::/0", ("", False, network("::/0"), (), USUAL)),
    ],
)
def test_each_form_of_a_rule_is_read(text: str, expected: tuple[Any, ...]) -> None:
    assert parse(text) == Rule(text, *expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "org", "*", "*.org", "*.*.x.org", "a.*.org", "a..org", ".x.org", "x.org.", "-a.org", "a-.org"),
        *(
            "x.org:",
            "x.org:0",
            "x.org:65536",
            "x.org:5-3",
            "x.org:1,",
            "x.org:,1",
            "x.org:1-2-3",
            "x.org:http",
        ),
        *(
            "x.org:80:90",
            "x.org/",
            "x.org:443/",
            "x.org/sctp",
            "x.org:1/icmp",
            "x.org/tcp/udp",
            "/tcp",
            ":80",
        ),
        *(
            "[1:2]:80",
            "a:80",
            "[::1",
            "::1]",
            "[::1]443",
            "[::1]:",
            "[]:80",
            "[10.0.0.0/8]:80",
            "[x.org]:443",
            "fe80::1%eth0",
        ),
        *("x.123", "b\u00fccher.example", "\u212aernel.org", "a" * 64 + ".org", "x.org\n", "http://x.org"),
        *("2001:db8::/32:443", ".".join(["a" * 49] * 5) + ".longer", "x.org:" + ",".join(["1"] * 33)),
    ],
)
def test_what_is_no_rule_is_refused_with_the_forms_of_one(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"{text[:200]!r} is no network rule; write NAME, *.NAME or a network such as 10.0.0.0/8, then :PORT "
        "or :FIRST-LAST, then /tcp, /udp or /icmp."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        ("1.2.3", "'1.2.3' does not appear to be an IPv4 or IPv6 network"),
        ("1.2.3.256", "'1.2.3.256' does not appear to be an IPv4 or IPv6 network"),
        ("10.0.0.0/33:80", "'10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        ("[2001:db8::1/32]:1", "2001:db8::1/32 has host bits set"),
        (":::", "':::' does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_a_network_that_is_none_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == f"The network rule {text!r} is none: {reason}."


label = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
domains = st.tuples(
    st.booleans(), st.lists(label, min_size=1, max_size=3), st.sampled_from(["org", "xn--p1ai"])
)
ports = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair))),
    max_size=32,
).map(tuple)
networks = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
        lambda pair: ipaddress.IPv4Network((pair[0] >> (32 - pair[1]) << (32 - pair[1]), pair[1]))
    ),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda pair: ipaddress.IPv6Network((pair[0] >> (128 - pair[1]) << (128 - pair[1]), pair[1]))
    ),
)


@given(st.one_of(domains, networks), ports, st.sampled_from(["", *PROTOCOLS]))
def test_a_rule_that_is_written_is_read_as_it_was_meant(
    place: object, ranges: tuple[tuple[int, int], ...], protocol: str
) -> None:
    if protocol == "icmp":
        ranges = ()
    if isinstance(place, tuple):
        below, labels, last = place
        domain, found = ".".join([*labels, last]), None
        destination = f"*.{domain}" if below else domain
    else:
        below, domain, found = False, "", place
        destination = f"[{place}]" if place.version == 6 and ranges else str(place)  # type: ignore[attr-defined]
    words = ",".join(f"{first}-{last}" if first != last else str(first) for first, last in ranges)
    text = destination + (f":{words}" if words else "") + (f"/{protocol}" if protocol else "")
    assert parse(text) == Rule(text, domain, below, found, ranges, (protocol,) if protocol else USUAL)  # type: ignore[arg-type]


@given(st.text(max_size=310))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse(text)
    except ConfigurationError as error:
        assert len(str(error)) < 2000
    else:
        assert bool(rule.domain) != (rule.network is not None)


@pytest.mark.parametrize(
    ("rule", "name", "about"),
    [
        ("x.org", "x.org", True),
        ("x.org", "a.x.org", False),
        ("*.x.org", "a.x.org", True),
        ("*.x.org", "b.a.x.org", True),
        ("*.x.org", "x.org", False),
        ("*.x.org", "evilx.org", False),
        ("10.0.0.0/8", "10.0.0.1", False),
    ],
)
def test_a_wildcard_is_about_all_below_and_not_the_name_itself(rule: str, name: str, about: bool) -> None:
    assert parse(rule).names(name) is about


def test_a_policy_has_rules_services_and_limits_in_bytes() -> None:
    found = policy("public", ["x.org"], ["10.0.0.0/8"], ["80", "5432:15432"], 7, 0.5)
    assert found == Policy(
        "public",
        (parse("x.org"),),
        (parse("10.0.0.0/8"),),
        (Service(80, 80), Service(5432, 15432)),
        7,
        1 << 19,
    )


@pytest.mark.parametrize(
    ("allow", "services", "key"),
    [(["x.org"], [], "network_allow"), ([], ["80"], "host_services"), (["x.org"], ["80"], "network_allow")],
)
def test_rules_without_a_network_are_refused(allow: list[str], services: list[str], key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        policy("none", allow, (), services)
    assert str(caught.value) == (
        f"{key} is set and network is 'none', so that nothing can be reached; set network to 'allowlist'."
    )


@pytest.mark.parametrize("text", ["0", "65536", "80:0", "80:65536", "53", "53:8053"])
def test_a_service_that_is_no_port_of_the_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        policy("allowlist", services=[text])
    assert str(caught.value) == (
        f"{text!r} is no port of the host for a guest; write PORT or GUEST:HOST, from 1 to 65535, and "
        "not 53 in the guest, where its DNS is."
    )


def test_more_ports_than_a_filter_can_have_are_refused() -> None:
    many = ",".join(map(str, range(1, 33)))
    assert policy("allowlist", [f"x.org:{many}"] * 16)
    with pytest.raises(ConfigurationError) as caught:
        policy("allowlist", [f"x.org:{many}"] * 16, ["10.0.0.0/8:80"])
    assert str(caught.value) == (
        "network_allow and network_deny have 513 ports and ranges of ports in all, and at most "
        "512 are possible; write ranges where you can."
    )
