"""Ports of a guest on the host's loopback: as a browser or a program uses them, and what they leave alone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.supervisor.overview import look_at_all
from tests.microvm import READY, Kernel, manager, microvm, until
from tests.vm.conftest import LIMIT

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "expose.md").read_text()
COMMAND = [sys.executable, "-m", "sandbox_kernel.cli.main"]
LARGE = 8 << 20
SERVERS = f"""
import hashlib, http.server, socket, threading

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"hello from {{socket.gethostname()}}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass

def exchange(connection):
    # Takes all, then tells its hash and sends as much: each way has an end of its own.
    with connection:
        seen = hashlib.sha256()
        while piece := connection.recv(1 << 16):
            seen.update(piece)
        data = (b"guest to host " * {LARGE // 14 + 1})[:{LARGE}]
        connection.sendall(seen.hexdigest().encode() + data)

def stay(connection):
    connection.recv(1)

def listen(port, serve):
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    def accept():
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()

server = http.server.ThreadingHTTPServer(("127.0.0.1", 8888), Page)
threading.Thread(target=server.serve_forever, daemon=True).start()
listen(7000, exchange)
listen(7001, stay)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("x") / "page.sock"


@pytest.fixture(scope="module")
def kernel(installed: None, place: Path) -> Iterator[Kernel]:
    """A kernel with three servers in it, restored where there is a template."""
    with microvm(expose=["8888", f"8888:{place}", "7000", "7001", "9999"]) as running:
        running.run(SERVERS)
        yield running


def port_of(kernel: Kernel, guest: int) -> int:
    """The host's port for a guest's, as the provisioner tells it."""
    [port] = [
        int(each["address"].rpartition(":")[2])
        for each in kernel.manager.provisioner.report["exposed"]
        if each["port"] == guest and ":" in each["address"]
    ]
    return port


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=READY) as answer:
        return str(answer.read().decode())


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=READY)


def test_a_page_of_the_guest_is_had_at_a_port_of_the_host(kernel: Kernel) -> None:
    assert page(f"http://127.0.0.1:{port_of(kernel, 8888)}/") == "hello from sandbox"


def test_localhost_is_the_same_whichever_address_that_is(kernel: Kernel) -> None:
    assert page(f"http://localhost:{port_of(kernel, 8888)}/") == "hello from sandbox"


def test_a_page_of_the_guest_is_had_at_a_unix_socket_for_this_user_alone(kernel: Kernel, place: Path) -> None:
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    connection = http.client.HTTPConnection("guest")
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.settimeout(READY)
        connection.sock.connect(str(place))
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"hello from sandbox"


def test_much_arrives_whole_both_ways_and_one_way_may_end_first(kernel: Kernel) -> None:
    data = os.urandom(LARGE)
    with socket.create_connection(("127.0.0.1", port_of(kernel, 7000)), timeout=READY) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            got = stream.read()
    assert got[:64].decode() == hashlib.sha256(data).hexdigest()
    assert got[64:] == (b"guest to host " * (LARGE // 14 + 1))[:LARGE]


def test_a_port_that_nobody_listens_on_is_told_promptly(kernel: Kernel) -> None:
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", port_of(kernel, 9999)), timeout=READY) as connection,
    ):
        connection.recv(1)


def test_idle_connections_take_nothing_from_the_kernel(kernel: Kernel) -> None:
    address = ("127.0.0.1", port_of(kernel, 7001))
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(address, timeout=READY))
        time.sleep(2)  # so that as many as may are open in the guest
        assert kernel.run("1+1") == "2"
        [seen] = [vm for vm in look_at_all() if vm["supervisor"] == kernel.supervisor.pid]
        assert seen["guest"]["alive"] is True
        cell = kernel.client.execute("while True: pass")
        time.sleep(1)
        kernel.manager.interrupt_kernel()
        assert kernel.reply_to(cell)["content"]["ename"] == "KeyboardInterrupt"
    assert page(f"http://127.0.0.1:{port_of(kernel, 8888)}/") == "hello from sandbox"


def test_a_port_comes_and_goes_while_the_kernel_runs(kernel: Kernel, place: Path) -> None:
    vm = kernel.manager.provisioner.report["id"]
    told = command("expose", vm, "8888")
    address = told.stdout.strip()
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address), told.stderr
    assert page(f"http://{address}/") == "hello from sandbox"
    assert f"8888 at {address}" in command("ps").stdout
    refused = command("expose", vm, f"8888:{address.rpartition(':')[2]}")
    assert refused.returncode == 1
    assert (
        refused.stderr
        == f"sandbox-kernel: Two ports are to be exposed at {address}; give each an address of its own.\n"
    )
    gone = command("unexpose", vm, f"8888:{address.rpartition(':')[2]}")
    assert (gone.returncode, gone.stderr) == (0, "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
    assert page(f"http://127.0.0.1:{port_of(kernel, 8888)}/") == "hello from sandbox"
    nothing = command("unexpose", vm, "1234")
    assert nothing.stderr.startswith("sandbox-kernel: 1234 is not exposed; there are: 8888:")


def test_a_restarted_kernel_is_where_it_was(kernel: Kernel, place: Path) -> None:
    before = port_of(kernel, 8888)
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=READY)
    assert port_of(kernel, 8888) == before
    kernel.run(SERVERS)
    assert page(f"http://127.0.0.1:{before}/") == "hello from sandbox"
    assert place.is_socket()


def test_a_booted_kernel_has_its_ports_over_a_dead_socket_and_leaves_none(
    installed: None, tmp_path: Path
) -> None:
    path = tmp_path / "page.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    with microvm(expose=["8888", f"8888:{path}"], start="cold") as kernel:
        kernel.run(SERVERS)
        port = port_of(kernel, 8888)
        assert page(f"http://127.0.0.1:{port}/") == "hello from sandbox"
        assert path.is_socket()
    assert until(lambda: not path.exists(), LIMIT)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def refusal(**config: object) -> str:
    """What a start with that configuration is refused with."""
    made = manager(**config)
    with pytest.raises(ConfigurationError) as caught:
        made.start_kernel()
    assert not made.has_kernel or not made.is_alive()
    return str(caught.value)


def test_a_port_that_is_taken_is_named_before_the_kernel_starts(installed: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal(expose=[f"8888:{port}"]) == (
            f"Port 8888 of the VM cannot be exposed at port {port} of this host, as somebody listens there "
            "already; choose another one in `expose`, or none for any that is free."
        )


def test_an_administrator_may_forbid_it(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_KERNEL_MAX_EXPOSE", "0")
    assert refusal(expose=["8888"]) == (
        "Ports to be exposed: 1, over the administrator's limit max_expose = 0; expose none."
    )


def test_the_documents_example_works_as_it_stands_there(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for port 9000, which somebody may have, and the browser."""
    shell = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    lab, curl, expose, unexpose = [line for block in shell for line in block.splitlines()]
    setting, _, rest = lab.partition(" ")
    assert rest == "jupyter lab notebooks/expose.ipynb"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    monkeypatch.setenv(*setting.replace("9000", port).split("="))
    notebook = nbformat.read(ROOT / "notebooks" / "expose.ipynb", as_version=4)
    [cell] = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (shown,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert cell.split() == shown.split()
    made = KernelManager(kernel_name=notebook.metadata.kernelspec.name)
    made.start_kernel()
    kernel = Kernel(made)
    try:
        kernel.run(cell)

        def run(line: str) -> str:
            line = line.replace("VM", made.provisioner.report["id"]).replace("9000", port)
            line = re.sub("^sandbox-kernel", shlex.join(COMMAND), line)
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=READY)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert run(curl) == "Hello from a micro-VM"
        assert page(f"http://{run(expose)}/") == "Hello from a micro-VM\n"
        assert run(unexpose) == ""
        assert made.provisioner.report["exposed"] == [{"port": 8888, "address": f"127.0.0.1:{port}"}]
    finally:
        kernel.client.stop_channels()
        made.shutdown_kernel(now=True)
