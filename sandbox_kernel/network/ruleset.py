"""The packet filter of a VM's namespace, as a pure function of the policy (nft(8)).

Nothing passes that no rule names; what is refused is answered at once and noted (nflog.py). Which addresses a
name has is not known here: each rule with a name has sets that the resolver fills as the guest looks it up
(resolver.py). A connection bears the mark of the policy that let it in: under another one it is judged anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sandbox_kernel.network.addresses import GUEST_MAC, TAP, UPLINK, V4, V6
from sandbox_kernel.policy import Network, Policy, Rule

TABLE = "sandbox"
GROUP = 1
"""Of netlink's log, that refusals are noted in."""
SNAP = 128
"""Bytes of a packet that are noted: its headers."""
LIFE = 90
"""Seconds that an address may be reached after its name was last resolved."""

INVALID, SPOOFED, LOOPING, OTHER_DNS, DENIED, CROWDED, PRIVATE, UNLISTED, ASKED_TOO_MUCH = (
    "invalid",
    "spoofed",
    "gateway",
    "other-dns",
    "deny:",
    "connections",
    "private",
    "unlisted",
    "dns-rate",
)
"""What a refusal is noted with: why. `DENIED` is followed by the rule's number."""

_ADDRESSES = 4096
"""Of one name's set at a time."""
_NOTES = "limit rate 50/second burst 100 packets"
_QUESTIONS = "limit rate 100/second burst 300 packets"
_DNS = "{ 53, 853, 5353, 5355 }"
_PRIVATE4 = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
)
"""Nobody's own, and not the internet's (IANA's registry of special-purpose addresses, RFC 6890); metadata
services of clouds have link-local ones, or those below and `_METADATA4`."""
_METADATA4 = ("168.63.129.16", "100.100.100.200")
_PRIVATE6 = (
    *("::/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "4000::/2", "8000::/1", "64:ff9b::/96"),
)
"""All but what is routed, 2000::/3, and of that what holds another address, or is for examples."""


def set_name(number: int, version: int, generation: int) -> str:
    """The set of the addresses that the name of the rule with this number in `allow` has.

    Another policy's is another one, which the resolver of the one before, or who reads its log, cannot fill.
    """
    return f"n{number}v{version}g{generation}"


def ruleset(policy: Policy, generation: int, own: Sequence[str] = ()) -> str:
    """The whole of the filter, in place of any before.

    Args:
        policy: what may pass.
        generation: mark of the connections that it lets in, from 1 on, another one for each policy.
        own: the host's own addresses, which no policy lets through.
    """
    return "\n".join(_lines(policy, generation, own)) + "\n"


def refresh(elements: dict[str, set[str]]) -> str:
    """Gives addresses in sets their whole life again, whether or not they are still there."""
    lines = []
    for name, addresses in elements.items():
        for address in sorted(addresses):
            place = f"element inet {TABLE} {name}"
            lines += [
                f"add {place} {{ {address} }}",
                f"delete {place} {{ {address} }}",
                f"add {place} {{ {address} }}",
            ]
    return "\n".join(lines) + "\n"


def _lines(policy: Policy, generation: int, own: Sequence[str]) -> Iterator[str]:
    # What is added first is there to be deleted, so that the whole is one transaction in every case.
    yield f"table inet {TABLE} {{}}"
    yield f"delete table inet {TABLE}"
    yield f"table netdev {TABLE} {{}}"
    yield f"delete table netdev {TABLE}"
    yield f"table netdev {TABLE} {{"
    yield f'  chain ingress {{ type filter hook ingress device "{TAP}" priority 0; policy drop;'
    yield f"    ether saddr {GUEST_MAC} ether type {{ ip, ip6, arp }} accept"
    yield "  }"
    yield "}"
    yield f"table inet {TABLE} {{"
    for number, rule in enumerate(policy.allow):
        if rule.domain:
            for version in (4, 6):
                yield f"  set {set_name(number, version, generation)} {{"
                yield f"    type ipv{version}_addr; size {_ADDRESSES}; timeout {LIFE}s;"
                yield "  }"
    yield "  set usual { type inet_proto; elements = { tcp, udp }; }"
    yield "  chain refuse {"
    yield "    meta l4proto tcp reject with tcp reset"
    yield "    reject with icmpx admin-prohibited"
    yield "  }"
    yield from _guard()
    yield from _input()
    yield from _output()
    yield from _forward(policy, generation, own)
    yield from _nat(policy)
    yield "}"


def _guard() -> Iterator[str]:
    """Nobody but the guest speaks on its link, before anything else is done for it."""
    yield "  chain guard { type filter hook prerouting priority raw; policy accept;"
    yield f'    iifname != "{TAP}" accept'
    yield f"    ip saddr {V4.guest} accept"
    yield f"    ip6 saddr {V6.guest} accept"
    yield "    ip6 saddr { ::, fe80::/10 } icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
    yield "    ip6 saddr { ::, fe80::/10 } drop"
    yield f"    {_note(SPOOFED)}"
    yield "    drop"
    yield "  }"


def _input() -> Iterator[str]:
    """What the guest may want of the namespace itself: DNS."""
    yield "  chain input { type filter hook input priority 0; policy drop;"
    yield f'    iifname "{UPLINK}" ct state established,related accept'
    yield "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
    yield f'    iifname != "{TAP}" drop'
    for family, word in ((V4, "ip"), (V6, "ip6")):
        to = f"{word} daddr {family.gateway}"
        yield f"    {to} udp dport 53 {_QUESTIONS} accept"
        yield f"    {to} tcp dport 53 ct state established,related accept"
        yield f"    {to} tcp dport 53 {_QUESTIONS} accept"
        yield f"    {to} meta l4proto {{ tcp, udp }} th dport 53 {_note(ASKED_TOO_MUCH)}"
        yield f"    {to} meta l4proto {{ tcp, udp }} th dport 53 drop"
    yield "    ct state established,related accept"
    yield from _refuse(LOOPING)
    yield "  }"


def _output() -> Iterator[str]:
    """What the namespace itself says: the resolver's questions, and answers."""
    yield "  chain output { type filter hook output priority 0; policy drop;"
    yield f'    oifname "{TAP}" accept'
    yield '    oifname "lo" accept'
    yield f"    ip daddr {V4.dns} meta l4proto {{ tcp, udp }} th dport 53 accept"
    yield "    ct state established,related accept"
    yield "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
    yield "  }"


def _forward(policy: Policy, generation: int, own: Sequence[str]) -> Iterator[str]:
    yield "  chain forward { type filter hook forward priority 0; policy drop;"
    yield f"    ct state established,related ct mark {generation} accept"
    yield f'    iifname != "{TAP}" drop'
    yield f"    ct state invalid {_note(INVALID)}"
    yield "    ct state invalid drop"
    yield "    jump judge"
    yield from _refuse(UNLISTED)
    yield "  }"
    yield "  chain crowded {"
    yield from _refuse(CROWDED)
    yield "  }"
    yield "  chain pass {"
    yield f"    ct count over {policy.connections} goto crowded"
    yield f"    ct mark set {generation} accept"
    yield "  }"
    for number, rule in enumerate(policy.deny):
        if rule.network is not None:
            yield f"  chain denied{number} {{"
            yield from _refuse(f"{DENIED}{number}")
            yield "  }"
    for number, rule in enumerate(policy.allow):
        if rule.domain:
            yield f"  chain allowed{number} {{"
            yield f"    {_traffic(rule)} goto pass"
            yield "  }"
    yield "  chain judge {"
    if policy.services:
        ports = _list(str(service.host) for service in policy.services)
        yield f"    ct status dnat ip daddr {V4.host} tcp dport {ports} goto pass"
    for word, family in (("ip", V4), ("ip6", V6)):
        near = f"{family.gateway}/{family.prefix}"
        for network in (family.uplink, near):
            yield from (f"    {word} daddr {network} {line.strip()}" for line in _refuse(LOOPING))
    for word, sign in (("ip", "."), ("ip6", ":")):
        if addresses := tuple(address for address in own if sign in address):
            match = f"{word} daddr {_list(addresses)}"
            yield from (f"    {match} {line.strip()}" for line in _refuse(LOOPING))
    for number, rule in enumerate(policy.deny):
        if rule.network is not None:
            # Who names no port and no protocol means ICMP, too.
            what = _traffic(rule) if rule.ports or len(rule.protocols) == 1 else ""
            yield f"    {_destination(rule.network)} {what} goto denied{number}"
    if policy.mode != "full":
        match = f"meta l4proto {{ tcp, udp }} th dport {_DNS}"
        yield from (f"    {match} {line.strip()}" for line in _refuse(OTHER_DNS))
    for rule in policy.allow:
        if rule.network is not None:
            yield f"    {_destination(rule.network)} {_traffic(rule)} goto pass"
    if policy.mode != "full":
        for word, networks in (("ip", (*_PRIVATE4, *_METADATA4)), ("ip6", _PRIVATE6)):
            match = f"{word} daddr {_list(networks)}"
            yield from (f"    {match} {line.strip()}" for line in _refuse(PRIVATE))
    for number, rule in enumerate(policy.allow):
        if rule.domain:
            for word, version in (("ip", 4), ("ip6", 6)):
                yield f"    {word} daddr @{set_name(number, version, generation)} jump allowed{number}"
    if policy.mode in ("public", "full"):
        yield "    goto pass"
    yield "  }"


def _nat(policy: Policy) -> Iterator[str]:
    yield "  chain nat { type nat hook postrouting priority srcnat; policy accept;"
    yield f'    oifname "{UPLINK}" masquerade'
    yield "  }"
    yield "  chain services { type nat hook prerouting priority dstnat; policy accept;"
    for service in policy.services:
        to = f'iifname "{TAP}" ip daddr {V4.gateway} tcp dport {service.guest}'
        yield f"    {to} dnat ip to {V4.host}:{service.host}"
    yield "  }"


def _destination(network: Network) -> str:
    return f"{'ip' if network.version == 4 else 'ip6'} daddr {network}"


def _traffic(rule: Rule) -> str:
    """The packets that a rule is about, wherever they go.

    Each set that stands in here is one more for each rule, and all of a filter goes to Linux at one time: in
    as many bytes as a socket may hold (net.core.wmem_default).
    """
    if "icmp" in rule.protocols:
        return "meta l4proto { icmp, icmpv6 }"
    match = f"meta l4proto {'@usual' if len(rule.protocols) > 1 else rule.protocols[0]}"
    ranges = [f"{first}-{last}" if first != last else str(first) for first, last in rule.ports]
    if ranges:
        match += f" th dport {ranges[0] if len(ranges) == 1 else _list(ranges)}"
    return match


def _refuse(why: str) -> Iterator[str]:
    yield f"    {_note(why)}"
    yield "    goto refuse"


def _note(why: str) -> str:
    return f'{_NOTES} log group {GROUP} snaplen {SNAP} prefix "{why}"'


def _list(items: Iterable[str]) -> str:
    return f"{{ {', '.join(items)} }}"
