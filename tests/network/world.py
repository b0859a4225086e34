"""Where a supervisor of these tests lives: a namespace of its own, whose only way out is the tests' internet.

    python -m tests.network.world FOLDER USER

USER is `root`, or `ordinary`: one without any right in this namespace, as an ordinary user of a host is. What
is said on standard input and output is the driver's (driver.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyroute2 import IPRoute

from tests.network.internet import DNS

_OWN = "10.200.0.1"
_INTERNET = "10.200.0.2"
_OWN6, _INTERNET6 = "fd77::1", "fd77::2"


def main(folder: Path, user: str) -> None:
    """Makes the internet, then becomes whoever drives kernels."""
    # The uplink's own jail takes /etc along, but not what is mounted in it.
    for name in ("etc", "work"):
        (folder / name).mkdir()
    (folder / "etc" / "resolv.conf").write_text(f"nameserver {DNS}\n")
    layers = f"lowerdir=/etc,upperdir={folder}/etc,workdir={folder}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "etc", "/etc"], check=True)
    internet = subprocess.Popen(
        [*("unshare", "--net", "--"), sys.executable, "-m", "tests.network.internet", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert internet.stdout is not None
    with IPRoute() as route:
        _until_apart(internet.pid)
        route.link("add", ifname="w0", kind="veth", peer={"ifname": "i0", "net_ns_pid": internet.pid})
        [index] = route.link_lookup(ifname="w0")
        [lo] = route.link_lookup(ifname="lo")
        Path("/proc/sys/net/ipv6/conf/w0/accept_dad").write_text("0")
        route.link("set", index=lo, state="up")
        route.addr("add", index=index, address=_OWN, prefixlen=24)
        route.addr("add", index=index, address=_OWN6, prefixlen=64)
        route.link("set", index=index, state="up")
        route.route("add", dst="default", gateway=_INTERNET)
        inside = ["nsenter", f"--net=/proc/{internet.pid}/ns/net", "sh", "-ec", _SETUP]
        subprocess.run(inside, check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
        route.route("add", dst="::/0", gateway=_INTERNET6, oif=index)
    assert internet.stdout.readline() == b"ready\n"
    nobody = [] if user == "root" else ["unshare", "--user", "--map-user=1500", "--map-group=1500", "--"]
    driver = subprocess.Popen([*nobody, sys.executable, "-m", "tests.network.driver"])
    driver.wait()
    internet.kill()


_SETUP = f"""
ip link set lo up
echo 0 > /proc/sys/net/ipv6/conf/i0/accept_dad
ip addr add {_INTERNET}/24 dev i0
ip addr add {_INTERNET6}/64 dev i0 nodad
ip link set i0 up
ip addr add {DNS}/32 dev lo
ip route add local 0.0.0.0/1 dev lo
ip route add local 128.0.0.0/1 dev lo
ip -6 route add local 2000::/3 dev lo
ip -6 route add local fc00:1::/32 dev lo
"""


def _until_apart(pid: int) -> None:
    """Waits for the internet to have a namespace of its own."""
    ours = Path("/proc/self/ns/net").stat().st_ino
    while Path(f"/proc/{pid}/ns/net").stat().st_ino == ours:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
