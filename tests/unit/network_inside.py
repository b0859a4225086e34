"""A network namespace for tests, of which whoever runs them is root: real programs in it, a guest's link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sandbox_kernel.network.addresses import TAP, V4, V6

os.environ["PATH"] += ":/usr/sbin:/sbin"

ASKER = textwrap.dedent(
    """
    import json, socket, struct, sys, time
    for line in sys.stdin:
        server, labels, kind = json.loads(line)
        parts = [each.encode('latin-1') for each in labels]
        name = b''.join(bytes([len(part)]) + part for part in parts) + bytes(1)
        question = struct.pack('>HHHHHH', 7, 256, 1, 0, 0, 0) + name + struct.pack('>HH', kind, 1)
        found = [-1, []]
        for attempt in range(50):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
                asker.settimeout(2)
                try:
                    asker.connect((server, 53))
                    asker.send(question)
                    answer = asker.recv(4096)
                except OSError:  # it is not up yet
                    time.sleep(0.05)
                    continue
            found = [answer[3] & 15, []]
            place = len(question)
            for _ in range(int.from_bytes(answer[6:8], 'big')):
                place += 2  # a pointer to the name
                rtype, _, _, size = struct.unpack_from('>HHIH', answer, place)
                data = answer[place + 10:place + 10 + size]
                place += 10 + size
                if rtype in (1, 28):
                    family = socket.AF_INET if rtype == 1 else socket.AF_INET6
                    found[1].append(socket.inet_ntop(family, data))
            break
        print(json.dumps(found), flush=True)
    """
)


def need(*programs: str) -> None:
    """Skips where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


class Inside:
    """The namespace."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._asker: subprocess.Popen[str] | None = None

    def argv(self, *argv: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--user", "--net", "--preserve-credentials", "--", *argv]

    def run(self, *argv: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*argv), input=text, capture_output=True, text=True, timeout=60, check=False
        )

    def nft(self, text: str, *options: str) -> str:
        """What nft says of a text; nothing when it is content."""
        done = self.run("nft", *options, "-f", "-", text=text)
        assert bool(done.returncode) == bool(done.stderr)
        return done.stderr

    def addresses(self, name: str) -> set[str]:
        """What is in a set of the filter."""
        done = self.run("nft", "-j", "list", "set", "inet", "sandbox", name)
        assert done.returncode == 0, done.stderr
        [found] = [each["set"] for each in json.loads(done.stdout)["nftables"] if "set" in each]
        elements = found.get("elem", [])
        return {each["elem"]["val"] if isinstance(each, dict) else each for each in elements}

    def ask(self, name: str | list[str], kind: int = 1) -> tuple[int, list[str]]:
        """The code of the resolver's answer, and the addresses in it; -1 when there is none."""
        if self._asker is None:
            self._asker = subprocess.Popen(
                self.argv(sys.executable, "-c", ASKER),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._asker.stdin is not None
        assert self._asker.stdout is not None
        labels = name.split(".") if isinstance(name, str) else name
        print(json.dumps((V4.gateway, labels, kind)), file=self._asker.stdin, flush=True)
        code, addresses = json.loads(self._asker.stdout.readline())
        return code, addresses

    def close(self) -> None:
        if self._asker is not None:
            self._asker.communicate()


@contextmanager
def inside() -> Iterator[Inside]:
    """A namespace with what stands for a guest's link."""
    need("unshare", "nsenter", "nft", "ip")
    words = ["unshare", "--user", "--map-root-user", "--net", "--", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            pytest.skip("this host lets nobody have a network namespace")
        made = Inside(process.pid)
        try:
            link = (
                f"link add {TAP} type veth peer name far0\nlink set far0 up\n"
                f"link set lo up\nlink set {TAP} up\n"
                f"addr add {V4.gateway}/{V4.prefix} dev {TAP}\n"
                f"addr add {V6.gateway}/{V6.prefix} dev {TAP} nodad\n"
            )
            done = made.run("ip", "-batch", "-", text=link)
            assert done.returncode == 0, done.stderr
            yield made
        finally:
            made.close()
            process.communicate()


@contextmanager
def started(place: Inside, argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program in the namespace."""
    process = subprocess.Popen(place.argv(*argv), text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
