"""The guest's only DNS server, dnsmasq(8), in the VM's namespace: its command line, and what its log says.

It asks the host's resolver for the names that the policy allows, answers all others by itself (NXDOMAIN),
and puts the addresses of a rule's name into that rule's sets before it answers. Answers that point to where a
name of the internet has no business are not passed on (rebinding). Answers live for a minute at most,
addresses in sets a little longer; as an address that is in a set already is not given a new life by dnsmasq,
that is done by whoever reads its log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.network.addresses import SERVICE_NAME, V4, V6
from sandbox_kernel.network.ruleset import TABLE, set_name
from sandbox_kernel.policy import Policy

_TTL = 60
"""Seconds that the guest may keep an answer."""
_CACHED = 1000
_FORWARDED = 64
"""Questions that may be under way at a time."""
_LONGEST_LINE = 1024

_BEGIN = r"(?:[A-Z][a-z]{2} [ 0-9]\d \d\d:\d\d:\d\d )?dnsmasq\[\d+\]: "
_STARTED = re.compile(_BEGIN + "started, ")
_LINE = re.compile(
    _BEGIN + r"(?:(?P<serial>\d{1,9}) \S+ )?"
    r"(?P<what>query\[[A-Za-z0-9=]{1,20}\]|reply|cached|config|possible DNS-rebind attack detected:)"
    r" (?P<name>\S+)(?: (?:is|from) (?P<value>\S+))?",
    re.ASCII,
)
"""Of a whole line: a name may have blanks in it, and look like the rest of one that says something else."""
_REBINDING = "possible DNS-rebind attack detected:"


@dataclass(frozen=True)
class Said:
    """What one line of its log tells.

    Attributes:
        serial: of the question.
        kind: `asked` (for addresses), `answered` (with one, or with a text that looks like one),
            `unknown` (refused by the policy) or `rebinding`.
        name: what was asked for, or is answered.
        value: an address; empty for none.
    """

    serial: int
    kind: str
    name: str
    value: str = ""


def command(dnsmasq: Path, policy: Policy, generation: int, upstream: str = V4.dns) -> list[str]:
    """The argv of a resolver for `policy`, as root of the VM's namespace.

    Args:
        dnsmasq: path of the program.
        policy: what may be looked up.
        generation: of the filter whose sets it fills.
        upstream: address of the server that is asked.
    """
    words = [
        str(dnsmasq),
        # Of its debugging mode what is wanted is that it forks for nothing and keeps the rights it has.
        *("--no-daemon", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--pid-file="),
        *(f"--listen-address={V4.gateway}", f"--listen-address={V6.gateway}", "--bind-interfaces"),
        *("--except-interface=lo", f"--max-ttl={_TTL}", f"--max-cache-ttl={_TTL}", f"--cache-size={_CACHED}"),
        *(f"--dns-forward-max={_FORWARDED}", "--log-queries=extra", "--log-facility=-"),
        *("--domain-needed", "--bogus-priv", "--no-ident", "--user=", "--group="),
    ]
    if policy.mode != "full":
        words.append("--stop-dns-rebind")
    if policy.services:
        words.append(f"--host-record={SERVICE_NAME},{V4.gateway}")
    words += _names(policy, generation, upstream)
    return words


def _names(policy: Policy, generation: int, upstream: str) -> Iterator[str]:
    """Which names are asked for where, and whose addresses go into which sets.

    For dnsmasq the most particular name counts, for a policy what is denied, so that each name of a rule gets
    two words that decide: of itself and of all below it that no rule has by its own name.
    """
    yield "--address=/#/" if policy.mode in ("none", "allowlist") else f"--server={upstream}"
    named = {rule.domain for rule in (*policy.allow, *policy.deny) if rule.domain}
    for domain in sorted(named):
        sets = set()
        for each in (domain, f"*.{domain}"):
            asked = _may_be_asked(policy, each)
            yield f"--server=/{each}/{upstream}" if asked else f"--address=/{each}/"
            if asked:
                for version in (4, 6):
                    names = sets_of(policy, generation, each, version)
                    sets |= {f"{version}#inet#{TABLE}#{name}" for name in names}
        if sets:  # for dnsmasq they are those of the names below, too
            yield f"--nftset=/{domain}/{','.join(sorted(sets))}"


def _may_be_asked(policy: Policy, name: str) -> bool:
    if any(rule.names(name) for rule in policy.deny):
        return False
    return policy.mode not in ("none", "allowlist") or any(rule.names(name) for rule in policy.allow)


def sets_of(policy: Policy, generation: int, name: str, version: int) -> list[str]:
    """The sets that an address of `name` belongs into."""
    return [
        set_name(number, version, generation)
        for number, rule in enumerate(policy.allow)
        if rule.domain and rule.names(name.lower())
    ]


def has_started(line: str) -> bool:
    """Whether a line of its log says that it answers from now on."""
    return _STARTED.match(line) is not None


def read(line: str) -> Said | None:
    """What a line of its log tells; None when that is of no interest."""
    found = _LINE.fullmatch(line) if len(line) <= _LONGEST_LINE else None
    if found is None:
        return None
    serial, what, name, value = (
        int(found["serial"] or 0),
        found["what"],
        found["name"].lower(),
        found["value"],
    )
    if what == _REBINDING:
        return Said(serial, "rebinding", name)
    if what in ("query[A]", "query[AAAA]"):
        return Said(serial, "asked", name)
    if what == "config" and value == "NXDOMAIN":
        return Said(serial, "unknown", name)
    if what in ("reply", "cached") and value and re.fullmatch(r"[0-9.]{7,15}|[0-9a-f:]*:[0-9a-f:.]*", value):
        return Said(serial, "answered", name, value)
    return None
