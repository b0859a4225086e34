"""A real ipykernel, started on this host by the agent and the launcher, its channels on adopted sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from guest_agent import Agent, answer, reaped, settings_for, short_folder
from jupyter_client import BlockingKernelClient

from agent_protocol import CHANNEL_PORTS, pack
from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.errors import GuestError, KernelStartError

ARGV = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
KEY = "0123456789abcdef"
CONNECTION = {"key": KEY, "signature_scheme": "hmac-sha256", "kernel_name": "test"}
PATIENCE = 60
# Here the kernel's parent is this process and not PID 1.
ENVIRONMENT = {"JPY_PARENT_PID": str(os.getpid()), "GREETING": "hello", "PATH": os.environ["PATH"]}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def agent(home: Path) -> Iterator[Agent]:
    with reaped() as children:
        made = Agent(children, settings_for(home))
        yield made
        made.ask("signal", number=int(signal.SIGKILL))
        made.ask("wait")


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[AgentClient]:
    connection = agent.connect()
    connection.setblocking(False)
    made = AgentClient(connection)
    yield made
    await made.aclose()


def jupyter(agent: Agent, home: Path) -> BlockingKernelClient:
    """A client whose endpoints are the sockets that the agent listens on in the place of vsock ports."""
    ports = dict(zip(CHANNEL_PORTS, range(1, 6), strict=True))
    for vsock_port in CHANNEL_PORTS.values():
        greeted(f"{agent.settings.sockets}/{vsock_port}")
    for channel, port in ports.items():
        (home / f"k-{port}").symlink_to(f"{agent.settings.sockets}/{CHANNEL_PORTS[channel]}")
    made = BlockingKernelClient()
    info: dict[str, Any] = {f"{channel}_port": port for channel, port in ports.items()}
    endpoints = {"transport": "ipc", "ip": str(home / "k"), "key": KEY.encode()}
    made.load_connection_info(info | CONNECTION | endpoints)
    made.start_channels()
    made.wait_for_ready(timeout=PATIENCE)
    return made


def greeted(path: str) -> None:
    """Waits until ZMQ has taken the socket over: a client without a manager gives a slow kernel up in 1 s."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        assert connection.recv(1) == b"\xff"  # how every ZMTP greeting begins


def run(kernel: BlockingKernelClient, code: str) -> str:
    printed: list[str] = []
    reply = kernel.execute_interactive(
        code, timeout=PATIENCE, output_hook=lambda message: printed.append(message["content"].get("text", ""))
    )
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed).strip()


def until_it_prints(kernel: BlockingKernelClient) -> None:
    while kernel.get_iopub_msg(timeout=PATIENCE)["msg_type"] != "stream":
        pass


def reply_to(kernel: BlockingKernelClient, asked: str) -> Any:
    while (reply := kernel.get_shell_msg(timeout=PATIENCE))["parent_header"]["msg_id"] != asked:
        pass
    return reply


async def test_a_kernel_lives_through_the_agent_on_all_five_channels(
    agent: Agent, client: AgentClient, home: Path
) -> None:
    (home / "work").mkdir()
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION, cwd=str(home / "work"))
    assert started.adopted is False
    assert abs(started.clock - time.time_ns()) < 60e9
    kernel = jupyter(agent, home)
    try:
        assert kernel.hb_channel.is_alive()
        seen = json.loads(
            run(
                kernel,
                "import json, os, sys\n"
                "print(json.dumps([os.getpid(), os.getsid(0), os.getcwd(), sys.argv, sys.path,"
                " sorted(sys.modules), dict(os.environ)]))",
            )
        )
        own_pid, session, folder, argv, path, modules, environment = seen
        assert own_pid == session == started.pid
        assert folder == str(home / "work")
        assert argv[1:] == ["-f", f"{agent.settings.run}/connection.json"]
        assert Path(argv[0]).name == "ipykernel_launcher.py"
        assert not any("guest" in Path(entry).parts for entry in path)
        assert not {"agent_protocol", "kernel"} & set(modules)
        assert environment["GREETING"] == "hello"
        assert environment["HOME"] == str(home)
        assert not [name for name in environment if name.startswith("SANDBOX")]

        asked = kernel.execute("print(input('name? '))", allow_stdin=True)
        assert kernel.get_stdin_msg(timeout=PATIENCE)["content"]["prompt"] == "name? "
        kernel.input("Ada")
        reply = reply_to(kernel, asked)
        assert reply["content"]["status"] == "ok"

        kernel.control_channel.send(kernel.session.msg("kernel_info_request"))
        assert kernel.get_control_msg(timeout=PATIENCE)["msg_type"] == "kernel_info_reply"

        assert await client.signal(0) is True
        status = await client.status()
        assert status.alive is True
        kernel.execute("import os; os._exit(7)")
        ended = await client.wait()
        assert (ended.code, ended.signal, ended.out_of_memory) == (7, None, False)
        assert await client.signal(2) is False
        with pytest.raises(GuestError, match="started already"):
            await client.start(ARGV, {}, CONNECTION)
    finally:
        kernel.stop_channels()


FORKS = """
import os, time
os.register_at_fork(after_in_parent=lambda: time.sleep(0.5))
print('on it', flush=True)
while True:
    child = os.fork()
    if child == 0: os._exit(0)
    os.waitpid(child, 0)
"""


@asynccontextmanager
async def conversation(
    agent: Agent, client: AgentClient, home: Path
) -> AsyncIterator[tuple[BlockingKernelClient, int]]:
    """With a kernel that the agent has started, whose process id is told, too."""
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION)
    kernel = jupyter(agent, home)
    try:
        yield kernel, started.pid
    finally:
        kernel.stop_channels()


@pytest.mark.parametrize(
    "cell", ["print('on it', flush=True)\nwhile True: pass", FORKS], ids=["a loop", "a fork"]
)
async def test_an_interrupt_reaches_the_cell_wherever_it_falls(
    agent: Agent, client: AgentClient, home: Path, cell: str
) -> None:
    async with conversation(agent, client, home) as (kernel, _):
        asked = kernel.execute(cell)
        until_it_prints(kernel)
        assert await client.signal(signal.SIGINT) is True
        reply = reply_to(kernel, asked)
        assert reply["content"]["ename"] == "KeyboardInterrupt"


async def test_a_forked_copy_of_the_kernel_ends_with_its_cell(
    agent: Agent, client: AgentClient, home: Path
) -> None:
    async with conversation(agent, client, home) as (kernel, _):
        asked = kernel.execute("import os\nif child := os.fork(): print(os.waitpid(child, 0)[1], flush=True)")
        while (message := kernel.get_iopub_msg(timeout=PATIENCE))["msg_type"] != "stream":
            pass
        while "Warning" in message["content"]["text"]:
            message = kernel.get_iopub_msg(timeout=PATIENCE)
        assert message["content"]["text"].strip() == "0"
        reply = reply_to(kernel, asked)
        assert reply["content"]["status"] == "ok"


async def test_the_stacks_of_a_kernel_are_told_while_it_computes_and_stopped_or_not(
    agent: Agent, client: AgentClient, home: Path
) -> None:
    async with conversation(agent, client, home) as (kernel, pid):
        # Time to be heard: what computes in C lets no other thread run.
        pause = "import time\nprint('on it', flush=True)\ntime.sleep(1)\n"
        kernel.execute("def computes():\n    sum(range(10**15))\n" + pause + "computes()")
        until_it_prints(kernel)
        async with asyncio.timeout(PATIENCE):
            while " in computes" not in await client.stacks():
                pass
        os.kill(pid, signal.SIGSTOP)
        assert " in computes" in await client.stacks()


async def test_a_kernel_that_is_none_of_pythons_has_no_stacks(agent: Agent, client: AgentClient) -> None:
    await client.start(["sleep", "600"], {}, CONNECTION)
    assert await client.stacks() == ""
    assert await client.signal(0) is True


def test_a_kernels_connection_file_is_its_users_alone(agent: Agent) -> None:
    connection = CONNECTION | {"ip": "0.0.0.0", "shell_port": 80}
    assert agent.ask("start", argv=["sleep", "600"], env={}, connection=connection)[0]["ok"] is True
    file = Path(agent.settings.run, "connection.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    content = json.loads(file.read_text())
    assert content["key"] == KEY
    assert (content["transport"], content["ip"], content["shell_port"]) == (
        "ipc",
        f"{agent.settings.run}/k",
        1,
    )


async def test_a_kernel_killed_by_a_signal_is_reported_so(agent: Agent, client: AgentClient) -> None:
    await client.start(["sleep", "600"], {}, CONNECTION)
    waiter = agent.connect()
    waiter.sendall(pack({"op": "wait"}))
    assert await client.signal(signal.SIGTERM) is True
    reply, _ = answer(waiter)
    waiter.close()
    assert (reply["code"], reply["signal"]) == (None, signal.SIGTERM)


async def test_a_kernel_that_ends_at_once_leaves_its_last_words(client: AgentClient) -> None:
    await client.start(["sh", "-c", "echo no module named ipykernel >&2; kill -TERM $$"], {}, CONNECTION)
    ended = await client.wait()
    assert ended.how() == "was killed by SIGTERM"
    assert ended.tail == "no module named ipykernel"


async def test_a_kernel_that_cannot_start_is_named_and_another_one_may_follow(
    agent: Agent, client: AgentClient
) -> None:
    with pytest.raises(KernelStartError, match=r"cannot be executed: /no/such: No such file or directory\.$"):
        await client.start(["/no/such"], {}, CONNECTION)
    with pytest.raises(KernelStartError, match="/no/such/folder"):
        await client.start(["true"], {}, CONNECTION, cwd="/no/such/folder")
    with pytest.raises(KernelStartError, match="/etc/passwd: Permission denied"):
        await client.start(["/etc/passwd"], {}, CONNECTION)
    assert (await client.start(["true"], {}, CONNECTION)).pid > 0
    assert (await client.wait()).code == 0


async def test_who_waits_and_goes_away_leaves_a_free_place(agent: Agent, client: AgentClient) -> None:
    await client.start(["sleep", "600"], {}, CONNECTION)
    before = threading.active_count()
    for _ in range(40):  # more than there are places
        with agent.connect() as waiter:
            waiter.sendall(pack({"op": "wait"}))
            waiter.shutdown(socket.SHUT_WR)
            assert answer(waiter)[0]["ok"] is False
    assert (await client.status()).alive is True
    assert threading.active_count() <= before + 2
