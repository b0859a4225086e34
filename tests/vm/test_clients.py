"""The clients people use, each against a kernel in a micro-VM, as a process of its own where it is one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil
import pytest
import tornado.httpclient
import websockets
from jupyter_client.connect import write_connection_file
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from tests.microvm import KERNEL, READY, until

BIN = Path(sys.executable).parent


def test_the_console_runs_what_is_typed(installed: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "console", "--kernel", KERNEL, "--simple-prompt"],
        input="import platform; print('guest', platform.node())\n6 * 7\nexit\n",
        capture_output=True,
        text=True,
        timeout=READY,
        check=True,
    )
    assert "guest sandbox" in done.stdout
    assert "42" in done.stdout


def test_nbclient_executes_a_notebook(installed: None, tmp_path: Path) -> None:
    cells = ["import os; os.getuid()", "%%capture out\nprint('captured')", "out.stdout"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    nbclient.NotebookClient(notebook, kernel_name=KERNEL, startup_timeout=READY, timeout=READY).execute()
    assert notebook.cells[0].outputs[0].data["text/plain"] == "1000"
    assert notebook.cells[2].outputs[0].data["text/plain"] == r"'captured\n'"


async def test_an_async_manager_starts_two_kernels_at_once(installed: None) -> None:
    managers = [AsyncKernelManager(kernel_name=KERNEL) for _ in range(2)]
    try:
        await asyncio.gather(*(manager.start_kernel() for manager in managers))
        answers = await asyncio.gather(*(_platform_of(manager) for manager in managers))
        assert len(set(answers)) == 2
    finally:
        await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in managers))


async def _platform_of(manager: AsyncKernelManager) -> str:
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    text = []
    await client.execute_interactive(
        "print(open('/proc/sys/kernel/random/boot_id').read())",
        output_hook=lambda m: text.append(m["content"].get("text", "")),
        timeout=READY,
    )
    client.stop_channels()
    return "".join(text).strip()


def test_a_client_that_ignores_provisioners_gets_a_micro_vm_all_the_same(
    installed: None, tmp_path: Path
) -> None:
    """What VS Code does: run the kernelspec's argv on a connection file of its own."""
    from jupyter_client import BlockingKernelClient

    file, _ = write_connection_file(str(tmp_path / "kernel.json"))
    argv = [
        word.replace("{connection_file}", file) for word in KernelSpecManager().get_kernel_spec(KERNEL).argv
    ]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        client = BlockingKernelClient(connection_file=file)
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=READY)
        asked = client.execute(
            "import time\ntry:\n    print('running', flush=True)\n    time.sleep(600)\n"
            "except KeyboardInterrupt: print('stopped')"
        )
        # Before the cell's own code runs, ipykernel answers an interrupt with `idle` and nothing else.
        while client.get_iopub_msg(timeout=READY)["msg_type"] != "stream":
            pass
        process.send_signal(signal.SIGINT)
        reply = client.get_shell_msg(timeout=READY)
        while reply["parent_header"]["msg_id"] != asked:
            reply = client.get_shell_msg(timeout=READY)
        assert reply["content"]["status"] == "ok"
        client.shutdown()
        assert process.wait(READY) == 0
        client.stop_channels()
    finally:
        process.kill()
        process.communicate()


class Server:
    """A Jupyter server with a token, and one websocket to one kernel."""

    def __init__(self, url: str, token: str, pid: int) -> None:
        self.url, self.token, self.pid = url, token, pid
        self.session = uuid.uuid4().hex

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        response = await tornado.httpclient.AsyncHTTPClient().fetch(
            self.url + path,
            method=method,
            body=json.dumps(body) if body is not None else None,
            headers={"Authorization": f"token {self.token}"},
            allow_nonstandard_methods=True,
            request_timeout=READY,
        )
        return json.loads(response.body) if response.body else None

    def socket(self, kernel: str) -> Any:
        url = self.url.replace("http", "ws", 1) + f"/api/kernels/{kernel}/channels?session_id={self.session}"
        return websockets.connect(
            url, additional_headers={"Authorization": f"token {self.token}"}, max_size=None
        )

    def message(self, kind: str, content: dict[str, Any], channel: str = "shell") -> str:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": kind,
            "username": "test",
            "session": self.session,
            "date": "2026-01-01T00:00:00Z",
            "version": "5.3",
        }
        return json.dumps(
            {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": channel}
        )


@pytest.fixture
def server(installed: None, tmp_path: Path) -> Iterator[Server]:
    token = uuid.uuid4().hex
    log = tmp_path / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_server", "--no-browser", "--port=0", "--allow-root"),
                *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}"),
            ],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")},
        )
    try:
        found: list[str] = []

        def started() -> bool:
            found[:] = re.findall(r"http://(?:localhost|127\.0\.0\.1):(\d+)/", log.read_text())
            return bool(found)

        def listens() -> bool:
            # It says where it will be a moment before it is there.
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", int(found[0]))) == 0

        assert until(started, READY), log.read_text()
        assert until(listens, READY), log.read_text()
        yield Server(f"http://127.0.0.1:{found[0]}", token, process.pid)
    finally:
        process.terminate()
        process.wait(READY)


@pytest.fixture
async def kernel_of_server(server: Server) -> AsyncIterator[tuple[Server, str]]:
    kernel = (await server.request("POST", "/api/kernels", {"name": KERNEL}))["id"]
    yield server, kernel
    await server.request("DELETE", f"/api/kernels/{kernel}")


async def test_one_websocket_of_a_server_executes_asks_interrupts_and_restarts(
    kernel_of_server: tuple[Server, str],
) -> None:
    server, kernel = kernel_of_server

    async def until_idle(socket: Any, execute: str, **answers: str) -> list[dict[str, Any]]:
        await socket.send(execute)
        sent = json.loads(execute)["header"]["msg_id"]
        got: list[dict[str, Any]] = []
        async with asyncio.timeout(READY):
            while True:
                message = json.loads(await socket.recv())
                if message["parent_header"].get("msg_id") != sent:
                    continue
                got.append(message)
                if message["msg_type"] == "input_request":
                    await socket.send(server.message("input_reply", {"value": answers["input"]}, "stdin"))
                if message["msg_type"] == "stream" and "interrupt me" in message["content"]["text"]:
                    await server.request("POST", f"/api/kernels/{kernel}/interrupt", {})
                if message["content"].get("execution_state") == "idle":
                    return got

    def execute(code: str) -> str:
        return server.message(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": True,
            },
        )

    async with server.socket(kernel) as socket:
        text = [
            m["content"]["data"]["text/plain"]
            for m in await until_idle(socket, execute("6 * 7"))
            if m["msg_type"] == "execute_result"
        ]
        assert text == ["42"]
        messages = await until_idle(socket, execute("print('hello', input('name? '))"), input="Ada")
        assert "hello Ada" in "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
        messages = await until_idle(
            socket, execute("x = 1\nprint('interrupt me', flush=True)\nwhile True: pass")
        )
        assert [m["content"]["ename"] for m in messages if m["msg_type"] == "error"] == ["KeyboardInterrupt"]
        await server.request("POST", f"/api/kernels/{kernel}/restart", {})
        messages = await until_idle(socket, execute("x"))
        assert [m["content"]["ename"] for m in messages if m["msg_type"] == "error"] == ["NameError"]


async def test_a_crashed_kernel_is_restarted_by_the_server(kernel_of_server: tuple[Server, str]) -> None:
    server, kernel = kernel_of_server
    qemu = [child for child in psutil.Process(server.pid).children(recursive=True) if "qemu" in child.name()]
    assert len(qemu) == 1
    deadline = time.monotonic() + READY
    async with server.socket(kernel) as socket:
        # Only who listens before hears of it: a restored kernel is back within a second.
        await socket.send(server.message("kernel_info_request", {}))
        while json.loads(await asyncio.wait_for(socket.recv(), READY))["msg_type"] != "kernel_info_reply":
            pass
        for process in qemu:
            process.kill()
        states = []
        while time.monotonic() < deadline and "restarting" not in states:
            message = json.loads(await asyncio.wait_for(socket.recv(), READY))
            states.append(message["content"].get("execution_state"))
        assert "restarting" in states
        await socket.send(server.message("kernel_info_request", {}))
        async with asyncio.timeout(READY):
            while json.loads(await socket.recv())["msg_type"] != "kernel_info_reply":
                pass


async def test_the_panel_of_jupyter_resource_usage_shows_the_vms_figures(
    kernel_of_server: tuple[Server, str],
) -> None:
    server, kernel = kernel_of_server
    async with server.socket(kernel) as socket:
        content = {"code": "hog = b'x' * (80 << 20)", "silent": False, "store_history": True}
        await socket.send(server.message("execute_request", content))
        async with asyncio.timeout(READY):
            while json.loads(await socket.recv())["msg_type"] != "execute_reply":
                pass
        told = await server.request("GET", f"/api/metrics/v1/kernel_usage/get_usage/{kernel}")
    figures = told["content"]
    assert figures["hostname"] == "sandbox"
    mib = 1 << 20
    assert 100 * mib < figures["kernel_memory"] < 400 * mib
    # The VM's memory and processors, not the host's.
    assert 800 * mib < figures["host_virtual_memory"]["total"] < 1024 * mib
    assert figures["cpu_count"] == 1
