"""The guest's DNS server: a real dnsmasq, what it looks up and for whom, and what its log says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from network_inside import Inside, inside, need, started

from sandbox_kernel.network.addresses import V4
from sandbox_kernel.network.resolver import Said, command, read, sets_of
from sandbox_kernel.network.ruleset import ruleset
from sandbox_kernel.policy import Policy, policy

NXDOMAIN = 3
UPSTREAM = "127.0.0.1#5300"
FOUND = (0, ["93.184.216.34"])
UNKNOWN = (NXDOMAIN, [])


def dnsmasq() -> Path:
    need("dnsmasq")
    return Path(str(shutil.which("dnsmasq")))


@pytest.fixture(scope="module")
def place() -> Iterator[Inside]:
    """A namespace with the internet's DNS, in which every name has the same address, but for some."""
    words = [
        str(dnsmasq()),
        "--no-daemon",
        "--conf-file=/dev/null",
        "--no-hosts",
        "--no-resolv",
        "--pid-file=",
    ]
    words += ["--user=", "--group=", "--port=5300", "--listen-address=127.0.0.1", "--bind-interfaces"]
    words += ["--local-ttl=30", f"--address=/#/{FOUND[1][0]}", "--address=/x.org/93.0.0.1"]
    words += [
        "--address=/a.x.org/93.0.0.2",
        "--address=/six.x.org/2606::6",
        "--address=/private.x.org/10.1.2.3",
    ]
    words += ["--txt-record=text.x.org,6.6.6.6"]
    with inside() as made, started(made, words, stderr=subprocess.DEVNULL):
        yield made


@contextmanager
def resolving(place: Inside, found: Policy, log: Path | None = None) -> Iterator[None]:
    """With the filter and the resolver of a policy."""
    assert place.nft(ruleset(found, 1)) == ""
    # The guest's questions come from here, and not over its link.
    assert place.nft("flush chain inet sandbox input\nadd rule inet sandbox input accept\n") == ""
    argv = command(dnsmasq(), found, 1, UPSTREAM)
    with (log or Path("/dev/null")).open("wb") as errors, started(place, argv, stderr=errors):
        yield


def test_the_command_line_is_taken_by_dnsmasq() -> None:
    names = ["x.org", "*.x.org:443", "_a._b.x.org", "xn--bcher-kva.example", "*.a.x.org", "a-b.c_d.org"]
    for mode in ("allowlist", "public", "full"):
        for found in (policy(mode), policy(mode, names, ["bad.org", "*.worse.org"], ["80"])):
            program, *words = command(dnsmasq(), found, 3)
            done = subprocess.run([program, "--test", *words], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "dnsmasq: syntax check OK.\n")


def test_as_many_names_as_there_may_be_are_taken_and_fit_into_a_request() -> None:
    label = "a" * 60
    names = [f"n{number}.{label}.{label}.{label}.org" for number in range(64)]
    program, *words = command(dnsmasq(), policy("allowlist", names, [f"*.{name}" for name in names]), 1)
    done = subprocess.run([program, "--test", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "dnsmasq: syntax check OK.\n")
    assert sum(map(len, words)) < 200_000
    assert max(map(len, words)) < 1000  # dnsmasq leaves out what is longer


@pytest.mark.parametrize(
    ("mode", "allow", "deny", "expected"),
    [
        ("allowlist", ["y.org"], [], {"y.org": 1, "a.y.org": 0, "evily.org": 0, "org.y": 0, "z.org": 0}),
        ("allowlist", ["*.y.org"], [], {"y.org": 0, "a.y.org": 1, "b.a.y.org": 1, "evily.org": 0}),
        ("allowlist", ["y.org", "*.y.org"], [], {"y.org": 1, "a.y.org": 1, "z.org": 0}),
        ("allowlist", ["*.y.org"], ["bad.y.org"], {"a.y.org": 1, "bad.y.org": 0, "a.bad.y.org": 1}),
        ("allowlist", ["*.y.org"], ["*.bad.y.org"], {"a.y.org": 1, "bad.y.org": 1, "a.bad.y.org": 0}),
        ("allowlist", ["a.y.org"], ["*.y.org"], {"a.y.org": 0, "b.y.org": 0, "y.org": 0}),
        ("allowlist", ["*.y.org", "a.y.org"], [], {"a.y.org": 1, "b.a.y.org": 1, "y.org": 0}),
        ("allowlist", ["y.org"], ["y.org"], {"y.org": 0}),
        ("allowlist", ["10.0.0.0/8"], [], {"y.org": 0}),
        ("allowlist", ["_a._b.y.org", "xn--bcher-kva.org"], [], {"_a._b.y.org": 1, "xn--bcher-kva.org": 1}),
        ("public", [], ["bad.org", "*.worse.org"],
         {"y.org": 1, "bad.org": 0, "a.bad.org": 1, "worse.org": 1, "a.worse.org": 0}),
        ("public", ["y.org"], [], {"a.y.org": 1, "z.org": 1}),
        ("full", ["y.org"], ["*.y.org"], {"y.org": 1, "a.y.org": 0}),
    ],
)  # fmt: skip
def test_a_name_is_looked_up_when_the_policy_says_so(
    place: Inside, mode: str, allow: list[str], deny: list[str], expected: dict[str, int]
) -> None:
    with resolving(place, policy(mode, allow, deny)):
        assert {name: place.ask(name) for name in expected} == {
            name: FOUND if asked else UNKNOWN for name, asked in expected.items()
        }


domain = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "y"]))
rule = st.tuples(st.sampled_from(["", "*."]), domain).map("".join)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["allowlist", "public"]), st.lists(rule, max_size=5), st.lists(rule, max_size=3),
    st.lists(domain, min_size=4, max_size=12),
)  # fmt: skip
def test_dnsmasq_decides_as_the_policy_reads(
    place: Inside, mode: str, allow: list[str], deny: list[str], names: list[str]
) -> None:
    found = policy(mode, allow, deny)
    with resolving(place, found):
        for name in names:
            denied = any(rule.names(name) for rule in found.deny)
            allowed = mode == "public" or any(rule.names(name) for rule in found.allow)
            assert place.ask(name) == (FOUND if allowed and not denied else UNKNOWN), name


def test_addresses_get_into_the_sets_of_their_names_rules_and_no_others(place: Inside) -> None:
    with resolving(place, policy("allowlist", ["x.org", "*.x.org", "other.org", "a.x.org:80", "10.0.0.0/8"])):
        assert place.ask("x.org") == (0, ["93.0.0.1"])
        assert place.addresses("n0v4g1") >= {"93.0.0.1"}
        assert place.addresses("n2v4g1") == place.addresses("n3v4g1") == set()
        assert place.ask("a.x.org") == (0, ["93.0.0.2"])
        assert place.addresses("n3v4g1") == {"93.0.0.2"}
        assert "93.0.0.2" in place.addresses("n1v4g1")
        assert place.ask("six.x.org", 28) == (0, ["2606::6"])
        assert place.addresses("n1v6g1") == {"2606::6"}
        assert place.addresses("n2v4g1") == place.addresses("n2v6g1") == set()


def test_a_name_alone_has_a_set_that_no_other_name_fills(place: Inside) -> None:
    with resolving(place, policy("allowlist", ["x.org:443", "*.a.x.org"], ["*.b.a.x.org"])):
        assert place.ask("a.x.org") == UNKNOWN
        assert place.ask("c.a.x.org") == (0, ["93.0.0.2"])
        assert place.addresses("n0v4g1") == set()
        assert place.addresses("n1v4g1") == {"93.0.0.2"}


@pytest.mark.parametrize(("mode", "told"), [("allowlist", False), ("public", False), ("full", True)])
def test_a_private_address_is_told_in_full_alone(place: Inside, mode: str, told: bool) -> None:
    with resolving(place, policy(mode, ["*.x.org"])):
        assert place.ask("private.x.org") == (0, ["10.1.2.3"] if told else [])
        assert place.addresses("n0v4g1") == ({"10.1.2.3"} if told else set())


def test_the_host_has_a_name_where_there_are_services(place: Inside) -> None:
    with resolving(place, policy("allowlist", services=["80"])):
        assert place.ask("host.internal") == (0, [V4.gateway])
    with resolving(place, policy("allowlist")):
        assert place.ask("host.internal") == UNKNOWN


def test_what_a_real_resolver_writes_down_is_read(place: Inside, tmp_path: Path) -> None:
    with resolving(place, policy("allowlist", ["*.x.org"]), tmp_path / "log"):
        for name in ("A.x.org", "a.x.org", "y.org", "private.x.org"):
            place.ask(name)
        place.ask("six.x.org", 28)
    said = [found for line in (tmp_path / "log").read_text().splitlines() if (found := read(line))]
    assert said == [
        Said(1, "asked", "a.x.org"),
        Said(1, "answered", "a.x.org", "93.0.0.2"),
        Said(2, "asked", "a.x.org"),
        Said(2, "answered", "a.x.org", "93.0.0.2"),
        Said(3, "asked", "y.org"),
        Said(3, "unknown", "y.org"),
        Said(4, "asked", "private.x.org"),
        Said(0, "rebinding", "private.x.org"),
        Said(5, "asked", "six.x.org"),
        Said(5, "answered", "six.x.org", "2606::6"),
    ]


def test_a_name_that_looks_like_an_answer_is_none(place: Inside, tmp_path: Path) -> None:
    names = ["a.x.org is 6.6.6.6 b.x.org", "dnsmasq[1]: 1 198.18.0.2/1 reply a.x.org is 6.6.6.6 .x.org"]
    names += ["\nNov 26 00:00:00 dnsmasq[1]: 1 198.18.0.2/1 reply a.x.org is 6.6.6.6\n.x.org"]
    with resolving(place, policy("allowlist", ["*.x.org"]), tmp_path / "log"):
        for name in names:
            place.ask([label or "." for label in name.split(".")])
        place.ask("text.x.org", 16)
    text = (tmp_path / "log").read_text()
    assert len(re.findall("reply", text)) >= 3, text
    said = [found for line in text.splitlines() if (found := read(line))]
    # What the text of a TXT record is, the log does not tell; of that question nothing else is known.
    assert said == [Said(said[0].serial, "answered", "text.x.org", "6.6.6.6")]


BEGIN = "Nov 26 21:40:38 dnsmasq[7]: "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5 198.18.0.2/53 query[A] X.org from 198.18.0.2", Said(5, "asked", "x.org")),
        ("5 198.18.0.2/53 query[AAAA] x.org from 198.18.0.2", Said(5, "asked", "x.org")),
        ("5 198.18.0.2/53 query[TXT] x.org from 198.18.0.2", None),
        ("5 198.18.0.2/53 query[type=65] x.org from 198.18.0.2", None),
        ("5 198.18.0.2/53 forwarded x.org to 198.18.1.3", None),
        ("5 198.18.0.2/53 reply x.org is 1.2.3.4", Said(5, "answered", "x.org", "1.2.3.4")),
        ("5 198.18.0.2/53 cached x.org is 2001:db8::1", Said(5, "answered", "x.org", "2001:db8::1")),
        ("5 198.18.0.2/53 reply x.org is <CNAME>", None),
        ("5 198.18.0.2/53 reply x.org is NXDOMAIN", None),
        ("5 198.18.0.2/53 reply x.org is NODATA-IPv6", None),
        ("5 198.18.0.2/53 config x.org is NXDOMAIN", Said(5, "unknown", "x.org")),
        ("5 198.18.0.2/53 config host.internal is 198.18.0.1", None),
        ("5 198.18.0.2/53 reply a b is 1.2.3.4", None),
        ("5 198.18.0.2/53 reply <name unprintable> is 1.2.3.4", None),
        ("possible DNS-rebind attack detected: x.org", Said(0, "rebinding", "x.org")),
        ("started, version 2.90 cachesize 1000", None),
        ("5 198.18.0.2/53 reply " + "x" * 1100 + " is 1.2.3.4", None),
        ("9999999999 198.18.0.2/53 reply x.org is 1.2.3.4", None),
    ],
)
def test_a_line_of_the_log_is_read(line: str, expected: Said | None) -> None:
    assert read(BEGIN + line) == expected
    assert read("x " + BEGIN + line) is None


WORDS = (
    "query[A]",
    "reply",
    "cached",
    "config",
    "is",
    "from",
    "5",
    BEGIN,
    "NXDOMAIN",
    "x.org",
    "1.2.3.4",
    "a/1",
)
PARTS = (*"a1. :[]/", "\n", "\0", "\u0660", *WORDS)


@given(
    st.one_of(
        st.text(),
        st.text().map(BEGIN.__add__),
        st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
        st.lists(st.sampled_from(WORDS), max_size=9).map(lambda words: BEGIN + " ".join(words)),
    )
)
@example("")
def test_any_line_is_read_or_of_no_interest(line: str) -> None:
    said = read(line)
    if said is not None:
        assert said.kind in ("asked", "answered", "unknown", "rebinding")
        assert len(said.name) <= 1024 and not re.search(r"\s", said.name, re.ASCII)
        assert len(said.value) <= 1024 and bool(said.value) == (said.kind == "answered")
        assert 0 <= said.serial < 10**9


def test_the_sets_of_a_name_are_those_of_each_rule_that_has_it() -> None:
    found = policy("allowlist", ["x.org", "*.x.org:443", "10.0.0.0/8", "*.a.x.org", "b.a.x.org"])
    assert sets_of(found, 2, "x.org", 4) == ["n0v4g2"]
    assert sets_of(found, 2, "B.a.x.org", 6) == ["n1v6g2", "n3v6g2", "n4v6g2"]
    assert sets_of(found, 2, "y.org", 4) == []
