"""What a VM's network may reach, as a person writes it.

    pypi.org                    that name, every port
    *.pythonhosted.org:443      every name below that one, port 443
    10.1.0.0/16:5432,6000-6100/tcp
    [2001:db8::/32]:443         an IPv6 network with ports is put in brackets

A rule is DESTINATION[:PORT[-PORT],…][/tcp|/udp|/icmp]; without ports all of them, without a protocol TCP and
UDP, and in `network_deny`, without ports, all there are. Four policies: `none` (no network device at all),
`allowlist` (what `network_allow` names), `public` (and whatever is nobody's own: neither private nor this
host's, a link's or a cloud's metadata), `full`. What `network_deny` names is refused in all of them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox_kernel.errors import ConfigurationError

MODES = ("none", "allowlist", "public", "full")
"""From the narrowest to the widest."""
PROTOCOLS = ("tcp", "udp", "icmp")
PATTERN = r"[^\s]{1,300}"
"""What a rule looks like from afar; see `parse`."""
SERVICE_PATTERN = r"[0-9]{1,5}(:[0-9]{1,5})?"
"""A port of the host that the guest may reach: HOST, or GUEST:HOST."""

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_SIX = r"[0-9a-f:.]*:[0-9a-f.]*:[0-9a-f:.]*(?:/[0-9]{1,3})?"
_RULE = re.compile(
    rf"(?:(?P<six>{_SIX})|(?:\[(?P<bracketed>{_SIX})\]|(?P<four>[0-9.]+(?:/[0-9]{{1,2}})?)"
    rf"|(?P<below>\*\.)?(?P<domain>{_LABEL}(?:\.{_LABEL})+))(?::(?P<ports>[0-9,-]+))?)"
    r"(?:/(?P<protocol>tcp|udp|icmp))?"
)
_LONGEST_NAME = 253
_PORTS = 65535
_MOST_RANGES = 32
_MOST_RANGES_IN_ALL = 512
"""Linux takes a filter at one time, of some size (net.core.wmem_default)."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: as it was written.
        domain: name without a wildcard, in lower case; empty for a network.
        below: whether the names below `domain` are meant, and not itself.
        network: addresses; None for a name.
        ports: first and last of each range; empty: all.
        protocols: which of `PROTOCOLS`.
    """

    text: str
    domain: str = ""
    below: bool = False
    network: Network | None = None
    ports: tuple[tuple[int, int], ...] = ()
    protocols: tuple[str, ...] = ("tcp", "udp")

    def names(self, name: str) -> bool:
        """Whether it is about `name`, in lower case."""
        if not self.domain:
            return False
        return name.endswith(f".{self.domain}") if self.below else name == self.domain


@dataclass(frozen=True)
class Service:
    """A TCP port of the host's loopback that the guest reaches at a port of its gateway."""

    guest: int
    host: int


@dataclass(frozen=True)
class Policy:
    """All that is decided of a VM's network.

    Attributes:
        mode: one of `MODES`.
        allow, deny: rules; those that deny count first.
        services: ports of the host.
        connections: at a time; also datagram flows.
        bandwidth: bytes a second in each direction; 0: any number.
    """

    mode: str = "none"
    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    services: tuple[Service, ...] = ()
    connections: int = 256
    bandwidth: int = 0


def parse(text: str) -> Rule:
    """The rule that `text` is.

    Raises:
        ConfigurationError: it is none.
    """
    found = _RULE.fullmatch(text.lower()) if text.isascii() else None
    if found is None or (found["ports"] and found["protocol"] == "icmp"):
        raise _wrong(text)
    ranges = tuple(_range(text, each) for each in found["ports"].split(",")) if found["ports"] else ()
    protocols = (found["protocol"],) if found["protocol"] else ("tcp", "udp")
    network = found["six"] or found["bracketed"] or found["four"]
    if len(ranges) > _MOST_RANGES:
        raise _wrong(text)
    if network:
        try:
            return Rule(text, network=ipaddress.ip_network(network), ports=ranges, protocols=protocols)
        except ValueError as error:
            raise ConfigurationError(f"The network rule {text!r} is none: {error}.") from error
    domain = found["domain"]
    if len(domain) > _LONGEST_NAME or domain.rpartition(".")[2].isdigit():
        raise _wrong(text)
    return Rule(text, domain, bool(found["below"]), None, ranges, protocols)


def policy(
    mode: str,
    allow: Sequence[str] = (),
    deny: Sequence[str] = (),
    services: Sequence[str] = (),
    connections: int = 256,
    bandwidth: float = 0.0,
) -> Policy:
    """The policy that a configuration describes.

    Args:
        mode: one of `MODES`.
        allow, deny: rules as text.
        services: as `SERVICE_PATTERN` has them.
        connections: at a time.
        bandwidth: MiB a second; 0: any number.

    Raises:
        ConfigurationError: a rule is none, they have too many ports, or there are rules without a network.
    """
    if mode == "none" and (allow or services):
        key = "network_allow" if allow else "host_services"
        raise ConfigurationError(
            f"{key} is set and network is 'none', so that nothing can be reached; set network to 'allowlist'."
        )
    rules = tuple(map(parse, allow)), tuple(map(parse, deny))
    ranges = sum(len(rule.ports) for each in rules for rule in each)
    if ranges > _MOST_RANGES_IN_ALL:
        raise ConfigurationError(
            f"network_allow and network_deny have {ranges} ports and ranges of ports in all, and at most "
            f"{_MOST_RANGES_IN_ALL} are possible; write ranges where you can."
        )
    return Policy(
        mode,
        *rules,
        tuple(map(_service, services)),
        connections,
        round(bandwidth * (1 << 20)),
    )


def _range(text: str, ports: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", ports)
    if found is None:
        raise _wrong(text)
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= _PORTS:
        raise _wrong(text)
    return first, last


def _service(text: str) -> Service:
    guest, _, host = text.partition(":")
    found = Service(int(guest), int(host or guest))
    if not (1 <= found.guest <= _PORTS and 1 <= found.host <= _PORTS) or found.guest == 53:
        raise ConfigurationError(
            f"{text!r} is no port of the host for a guest; write PORT or GUEST:HOST, from 1 to {_PORTS}, and "
            "not 53 in the guest, where its DNS is."
        )
    return found


def _wrong(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text[:200]!r} is no network rule; write NAME, *.NAME or a network such as 10.0.0.0/8, then :PORT "
        "or :FIRST-LAST, then /tcp, /udp or /icmp."
    )
