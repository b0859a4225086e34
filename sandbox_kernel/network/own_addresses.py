"""Which addresses this host has, by Linux' own tables (proc(5)): no guest reaches them by its network."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

_FOUR = Path("/proc/net/fib_trie")
_SIX = Path("/proc/net/if_inet6")
_MOST = 1024
_LOCAL = re.compile(r"\|-- ([0-9.]{7,15})\n +/32 host LOCAL")


def own_addresses() -> tuple[str, ...]:
    """They, without those of the loopback and of links, which no guest reaches anyway."""
    found = {ipaddress.ip_address(each) for each in _LOCAL.findall(_read(_FOUR))}
    for line in _read(_SIX).splitlines():
        found.add(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])))
    shown = [each for each in found if not each.is_loopback and not each.is_link_local]
    return tuple(str(each) for each in sorted(shown, key=lambda each: (each.version, int(each)))[:_MOST])


def _read(table: Path) -> str:
    try:
        return table.read_text()
    except FileNotFoundError:
        return ""  # of a host without that version of IP
