"""The process that a VM's network namespace is: it makes what is in there, and ends with its supervisor.

Run by namespace.py, as root of a user namespace of its own (that is, with the rights of whoever started
the client) and in a new network namespace. One request at a time comes over a socket for packets (unix(7)),
as JSON; each is answered by `{"ok": true}` or `{"ok": false, "message": …}`, with the request's `serial` and
sometimes with descriptors:

    {}              (said by itself, when all is there) → the tap and netlink's log
    rules           text → nothing: nft(8) does it as one transaction
    resolver        argv → a pipe with the log of the resolver, which takes the place of any before
    uplink          → nothing: the uplink's device has come, and is the way out
    rate            bytes (a second, each way; 0: any) → nothing
    counters        → received, sent (bytes, as the guest sees them)

When the socket closes, the process ends. It is the first of a PID namespace, so that Linux ends with it what
it has started, at whatever point of its start that is, and with all of them the network namespace.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from sandbox_kernel.network import nflog
from sandbox_kernel.network.addresses import GATEWAY_MAC, GUEST_MAC, TAP, UPLINK, UPLINK_V6, V4, V6
from sandbox_kernel.network.ruleset import GROUP, SNAP

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_PR_SET_PDEATHSIG = 1
_PERMANENT = 0x80  # NUD_PERMANENT, neighbour.h
_WORDS = 2000
_MOST = 1 << 20
_PATIENCE = 10.0
_BURST = 64 * 1024
_LATENCY = "50ms"
_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/all/arp_ignore": "1",
    # A guest's own address is nowhere else, so nobody has to be asked for a second whether it is.
    "net/ipv6/conf/default/accept_dad": "0",
}


class Holder:
    """What is in the namespace."""

    def __init__(self, tools: dict[str, str]) -> None:
        """Makes it: the guest's link and the log; what may pass is for the first `rules` to say.

        Args:
            tools: path of `nft`.

        Raises:
            OSError, NetlinkError, subprocess.SubprocessError: this host does not have what it takes.
        """
        self._tools = tools
        self._resolver: subprocess.Popen[bytes] | None = None
        for name, value in _SYSCTLS.items():
            Path("/proc/sys", name).write_text(value)
        self.tap = _open_tap(TAP)
        self._route = IPRoute()
        self._link = self._index(TAP)
        self._route.link("set", index=self._index("lo"), state="up")
        self._route.link("set", index=self._link, address=GATEWAY_MAC)
        for family in (V4, V6):
            self._route.addr("add", index=self._link, address=family.gateway, prefixlen=family.prefix)
        self._route.link("set", index=self._link, state="up")
        for family in (V4, V6):
            # Nothing that the guest says on its link changes who it is.
            self._route.neigh("add", dst=family.guest, lladdr=GUEST_MAC, ifindex=self._link, state=_PERMANENT)
        self.log = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nflog.NETLINK_NETFILTER
        )
        self.log.bind((0, 0))
        self.log.send(nflog.subscribe(GROUP, SNAP))

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Does what is asked for; what to say, and descriptors to be sent along and then closed."""
        op = request.get("op")
        if op == "rules":
            self._nft(str(request["text"]))
            return {}, []
        if op == "resolver":
            return {}, [self._start_resolver([str(word) for word in request["argv"]])]
        if op == "uplink":
            # Its program configures IPv4 alone.
            link = self._index(UPLINK)
            self._route.addr("add", index=link, address=UPLINK_V6, prefixlen=int(V6.uplink.split("/")[1]))
            self._route.route("add", dst="::/0", gateway=V6.host, oif=link)
            return {}, []
        if op == "rate":
            self._limit(int(request["bytes"]))
            return {}, []
        if op == "counters":
            [link] = self._route.get_links(self._link)
            stats = link.get_attr("IFLA_STATS64")
            return {"received": stats["tx_bytes"], "sent": stats["rx_bytes"]}, []
        raise ValueError(f"no operation {op!r}")

    def _nft(self, text: str) -> None:
        done = subprocess.run(
            [self._tools["nft"], "-f", "-"],
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_PATIENCE,
            check=False,
        )
        if done.returncode:
            raise OSError(f"nft: {done.stderr.decode(errors='replace').strip()[:_WORDS]}")

    def _start_resolver(self, argv: list[str]) -> int:
        """Starts it, in place of any before; the reading end of its log."""
        if self._resolver is not None:
            self._end_resolver(self._resolver)
            with suppress(ChildProcessError):  # the first process of a namespace gets everybody's orphans
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._resolver = subprocess.Popen(
                argv,  # bubblewrap's
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=writer,
                cwd="/",
            )
        finally:
            os.close(writer)
        return reader

    def _end_resolver(self, jail: subprocess.Popen[bytes]) -> None:
        """Ends a resolver; returns when its port is free: the jail's process ends after all that is in it."""
        children = Path(f"/proc/{jail.pid}/task/{jail.pid}/children")
        with suppress(OSError):
            for pid in map(int, children.read_text().split()):
                os.kill(pid, signal.SIGKILL)
        try:
            jail.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            jail.kill()
            jail.wait()

    def _limit(self, rate: int) -> None:
        """Bounds what passes to the guest, and from it, once the uplink is there."""
        for name in (TAP, UPLINK):
            with suppress(NetlinkError):
                self._route.tc("del", index=self._index(name), root=True)
            if rate:
                self._route.tc(
                    "add", "tbf", self._index(name), 0x10000, rate=rate, burst=_BURST, latency=_LATENCY
                )

    def _index(self, name: str) -> int:
        found = self._route.link_lookup(ifname=name)
        if not found:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
        return int(found[0])


def _open_tap(name: str) -> int:
    """Makes a tap (Documentation/networking/tuntap.rst) and returns its other end."""
    tap = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(tap)
        raise
    return tap


def serve(connection: socket.socket, tools: dict[str, str]) -> None:
    """Makes the namespace and answers until nobody asks any more."""
    try:
        holder = Holder(tools)
        _say(connection, {"ok": True}, [holder.tap, holder.log.fileno()])
        os.close(holder.tap)  # QEMU's alone from now on
        holder.log.close()
    except (OSError, NetlinkError, subprocess.SubprocessError) as error:
        _say(connection, {"ok": False, "message": _words(error)}, [])
        return
    while request := connection.recv(_MOST):
        asked = json.loads(request)
        serial = {"serial": asked["serial"]}
        try:
            answer, fds = holder.answer(asked)
        except (OSError, NetlinkError, subprocess.SubprocessError, ValueError, KeyError) as error:
            _say(connection, {"ok": False, "message": _words(error), **serial}, [])
            continue
        _say(connection, {"ok": True, **answer, **serial}, fds)
        for fd in fds:
            os.close(fd)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or repr(error)


def _say(connection: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    socket.send_fds(connection, [json.dumps(message).encode()], fds)


def main() -> None:
    """Serves on the descriptor that is the first argument, with the tools that the second one names."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection, suppress(ConnectionError):
        serve(connection, json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
