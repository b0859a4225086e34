"""The tests' internet: one namespace that answers for every address, run as a program in there.

    python -m tests.network.internet FOLDER

TCP ports say who was reached and hang up; UDP ports send back what comes; port 80 speaks HTTP. Names are
served by dnsmasq, which writes down what it was asked in FOLDER/dns.log.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

TCP = (22, 25, 443, 853, 3128, 5000, 5432, 6000, 8080)
UDP = (123, 443, 5000)
DNS = "9.9.9.9"
NAMES = {
    "example.org": ("93.184.216.34", "2606:2800::34"),
    "www.example.org": ("93.184.216.35", ""),
    "other.org": ("93.184.216.99", "2606:2800::99"),
    "a.wild.net": ("151.101.0.1", ""),
    "b.wild.net": ("151.101.0.2", ""),
    "wild.net": ("151.101.0.9", ""),
    "rebound.example.org": ("10.1.2.3", ""),
    "rebound.wild.net": ("169.254.169.254", ""),
    "loop.wild.net": ("127.0.0.1", ""),
    "bad.org": ("93.184.216.66", ""),
    "pypi.org": ("151.101.64.223", ""),
    "files.pythonhosted.org": ("151.101.65.63", ""),
}
PAGE = b"x" * 1000


def main(folder: Path) -> None:
    """Serves until the end of standard input."""
    for port in TCP:
        _listen(port, _tell)
    _listen(80, _page)
    for port in UDP:
        _echo(port)
    records = [
        f"--host-record={name}," + ",".join(filter(None, addresses)) for name, addresses in NAMES.items()
    ]
    resolver = subprocess.Popen(
        [
            *(
                "setpriv",
                "--pdeathsig",
                "KILL",
                "dnsmasq",
                "--no-daemon",
                "--conf-file=/dev/null",
                "--no-hosts",
                "--no-resolv",
                "--pid-file=",
            ),
            *("--log-queries", f"--log-facility={folder}/dns.log", "--local-ttl=30", "--user=", "--group="),
            *("--address=/#/", "--address=/tunnel.wild.net/151.101.0.7", *records),
        ]
    )
    print("ready", flush=True)
    sys.stdin.read()
    resolver.kill()


def _listen(port: int, serve: object) -> None:
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()  # type: ignore[arg-type]

    threading.Thread(target=accept, daemon=True).start()


def _tell(connection: socket.socket) -> None:
    """Says which address was reached; goes on as an echo."""
    with connection:
        host, port = connection.getsockname()[:2]
        connection.sendall(f"{host.removeprefix('::ffff:')} {port}\n".encode())
        while data := connection.recv(65536):
            connection.sendall(data)


def _page(connection: socket.socket) -> None:
    with connection:
        request = connection.recv(65536).split(b"\r\n")[0]
        words = request.split()
        size = int(words[1][1:]) if len(words) > 1 and words[1][1:].isdigit() else len(PAGE)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
        while size > 0:
            size -= connection.send(PAGE * min(65, size // len(PAGE) + 1) if size > 999 else PAGE[:size])


def _echo(port: int) -> None:
    receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # The answer has to come from the address that was asked, of which there are all.
    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    receiver.bind(("::", port))

    def answer() -> None:
        while True:
            data, ancillary, _, peer = receiver.recvmsg(65536, 256)
            receiver.sendmsg([data], ancillary, 0, peer)

    threading.Thread(target=answer, daemon=True).start()


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    main(Path(sys.argv[1]))
