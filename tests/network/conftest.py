"""A kernel with a network, in an internet of the tests' own, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adversarial import image
from tests.microvm import READY

_HELPERS = """
import socket, time
def reach(host, port, timeout=10):
    '''What answers there, or how it does not.'''
    try:
        with socket.create_connection((host, port), timeout) as connection:
            return connection.recv(99).decode().strip()
    except OSError as error:
        return type(error).__name__
def echo(host, port, data=b'x', timeout=2):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(timeout)
        try:
            sender.connect((host, port))
            sender.send(data)
            return sender.recv(65536) == data
        except OSError as error:
            return type(error).__name__
def look_up(name):
    try:
        return sorted({found[4][0] for found in socket.getaddrinfo(name, 80)})
    except OSError as error:
        return type(error).__name__
def ask(server, name, tcp=False, timeout=2):
    '''The code of a DNS server's answer.'''
    import struct
    labels = b''.join(bytes([len(each)]) + each.encode() for each in name.split('.'))
    question = struct.pack('>HHHHHH', 7, 256, 1, 0, 0, 0) + labels + struct.pack('>BHH', 0, 1, 1)
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET6 if ':' in server else socket.AF_INET, kind) as asker:
        asker.settimeout(timeout)
        try:
            asker.connect((server, 53))
            asker.send((struct.pack('>H', len(question)) if tcp else b'') + question)
            answer = asker.recv(512)
            return answer[3 + 2 * tcp] & 15
        except OSError as error:
            return type(error).__name__
"""


class World:
    """A kernel in the world, which runs cells and changes its policy."""

    def __init__(self, folder: Path, user: str) -> None:
        self.folder, self.user = folder, user
        self.config: dict[str, Any] | None = None
        rights = ["--user", "--map-root-user"] if os.getuid() else []
        self._process = subprocess.Popen(
            [
                *("unshare", *rights, "--net", "--mount", "--fork", "--kill-child", "--"),
                *(sys.executable, "-m", "tests.network.world", str(folder), user),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        if "error" in said:
            raise RuntimeError(f"{said['error']}: {said['message']}")
        return said["ok"]

    def start(self, **config: Any) -> str:
        """Starts a kernel, in place of any before; its VM."""
        self._say(stop=True)
        self.config = None
        vm: str = self._say(start=config)
        self._say(cell=_HELPERS)
        self.config = config
        return vm

    def run(self, cell: str) -> str:
        """What a cell prints."""
        text: str = self._say(cell=textwrap.dedent(cell))
        return text

    def value(self, expression: str) -> Any:
        """What an expression is in the kernel, without what the host says of it."""
        said = self.run(f"print({expression!r} and '\\x01' + repr({expression}))")
        return eval(said.partition("\x01")[2])

    def as_root(self, script: str) -> str:
        """What a script prints that root runs in the guest."""
        said = self.run(
            f"""
            import os, time
            with open('/tmp/draft', 'w') as file: file.write({textwrap.dedent(script)!r})
            os.rename('/tmp/draft', '/tmp/root.py')
            deadline = time.time() + 60
            while not os.path.exists('/tmp/root.done') and time.time() < deadline: time.sleep(0.05)
            os.remove('/tmp/root.done')
            print(open('/tmp/root.out').read(), end='')
            """
        )
        return "\n".join(line for line in said.splitlines() if not line.startswith("[sandbox-kernel]"))

    def policy(self, mode: str, allow: tuple[str, ...] = (), deny: tuple[str, ...] = (), **more: Any) -> Any:
        """Has another policy hold."""
        return self.ask(op="network", network=mode, network_allow=allow, network_deny=deny, **more)

    def ask(self, **request: Any) -> Any:
        """What the VM's window answers."""
        return self._say(ask=request)

    def host(self, code: str) -> Any:
        """What an expression is on the host of this world."""
        return self._say(host=code)

    def command(self, name: str, *arguments: str) -> str:
        """What `sandbox-kernel NAME VM ARGUMENTS` prints."""
        said: str = self._say(command=[name, *arguments])
        return said

    def neighbour(self, cell: str, **config: Any) -> str:
        """Starts one more kernel, which ends with the other one, and has it run a cell; its VM."""
        vm: str = self._say(neighbour=config, runs=textwrap.dedent(cell))
        return vm

    def stop(self) -> None:
        """Ends the kernel."""
        self._say(stop=True)

    def shell(self, command: str, **environment: str) -> str:
        """What a command says that the world's user types, with these variables beside the others."""
        text: str = self._say(shell=command, environment=environment)
        return text

    def refusals(self) -> list[dict[str, Any]]:
        """All that was noted so far."""
        return [json.loads(line) for line in self._say(log="network.log").splitlines()]

    def asked(self) -> str:
        """What the internet's DNS server was asked."""
        return (self.folder / "dns.log").read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(READY)
        finally:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session", params=["as_root", "as_an_ordinary_user"])
def place(
    request: pytest.FixtureRequest, installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The world, without a kernel yet."""
    if request.param == "as_root" and os.getuid() != 0:
        pytest.skip("this is not root")
    made = World(tmp_path_factory.mktemp("world"), request.param.rpartition("_")[2])
    yield made
    made.close()


@pytest.fixture(scope="session")
def adversary(installed: None) -> str:
    """The image whose root is an attacker, too."""
    return image.ensure()


@pytest.fixture
def world(place: World, adversary: str) -> World:
    """The world, with a kernel of that image, the same for all tests; each sets its policy."""
    config = {"image": adversary, "network": "allowlist", "host_services": ["7001:7000"], "memory": 512}
    if place.config != config:
        place.start(**config)
    return place
