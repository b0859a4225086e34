"""Who has which address. Every VM has a namespace of its own, so all of them have the same ones.

    guest ── tap (QEMU's network device) ── the VM's namespace: filter, NAT, DNS ── uplink (slirp4netns)

IPv4 addresses are of 198.18.0.0/15, which is for tests of equipment (RFC 2544) and routed nowhere; IPv6
ones are local (RFC 4193). Templates have the guest's in them: a change makes these stale
(template/key.py, `FORMAT`).
"""

from __future__ import annotations

from dataclasses import dataclass

TAP = "tap0"
UPLINK = "up0"
GUEST_MAC = "02:53:4b:00:00:02"
GATEWAY_MAC = "02:53:4b:00:00:01"


@dataclass(frozen=True)
class Family:
    """The addresses of one version of IP.

    Attributes:
        guest: the guest's.
        gateway: the namespace's on the guest's side, where its DNS is.
        prefix: bits of the network of these two.
        uplink: network on the other side, as CIDR.
        host: address there that stands for the host's loopback.
        dns: address there that stands for the host's DNS.
    """

    guest: str
    gateway: str
    prefix: int
    uplink: str
    host: str
    dns: str


V4 = Family("198.18.0.2", "198.18.0.1", 30, "198.18.1.0/24", "198.18.1.2", "198.18.1.3")
V6 = Family("fd53:4b::2", "fd53:4b::1", 64, "fd00::/64", "fd00::2", "fd00::3")
UPLINK_V6 = "fd00::100"
"""The namespace's own address at its uplink; that of IPv4 is the uplink's program's choice."""
LINKS = {
    name: {"address": family.guest, "prefix": family.prefix, "gateway": family.gateway}
    for name, family in (("ipv4", V4), ("ipv6", V6))
}
"""What a guest is told (agent/protocol.py, `network`)."""
SERVICE_NAME = "host.internal"
"""What the guest calls the gateway, where services of the host are."""
