"""A template's kernel: started and warm before anybody has asked for it, a stranger's afterwards."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cgroup
import system
import template
from children import Children
from kernel_process import Order
from sandbox_kernel.agent.client import AgentClient, Configuration
from sandbox_kernel.errors import GuestError
from sandbox_kernel.network.addresses import LINKS
from template import Standby, wish
from tests.unit.guest_agent import Agent, reaped, settings_for, short_folder
from tests.unit.test_guest_kernel import ARGV, CONNECTION, ENVIRONMENT, client, jupyter, run

__all__ = ["client"]

LOOK = """
import json, os, sys
me = get_ipython()
print(json.dumps({
    "argv": sys.argv[1:], "path": sys.path, "environment": dict(os.environ), "folder": os.getcwd(),
    "names": sorted(name for name in globals() if name not in ("json", "os", "sys", "me")),
    "values": [repr(globals().get(name)) for name in ("_", "__", "___", "_i", "_ii", "_oh", "_dh", "Out")],
    "count": me.execution_count, "modules": sorted(sys.modules), "handlers": sorted(me.events.callbacks),
    "history": [list(row) for row in me.history_manager.get_range()],
}))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def children() -> Iterator[Children]:
    with reaped() as made:
        yield made


@pytest.fixture
def agent(children: Children, home: Path) -> Agent:
    return Agent(children, settings_for(home))


@pytest.fixture
def standing_by(agent: Agent, children: Children) -> Agent:
    agent.operations.standby = Standby(children, agent.settings, ["colorsys", "no_such_module"])
    assert agent.operations.standby.until_ready()
    return agent


async def seen_by_user_code(agent: Agent, client: AgentClient, home: Path, **options: Any) -> dict[str, Any]:
    waiting = agent.operations.standby
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION, **options)
    assert started.adopted is (waiting is not None)
    kernel = jupyter(agent, home)
    try:
        found: dict[str, Any] = json.loads(run(kernel, LOOK))
        return found
    finally:
        kernel.stop_channels()
        await client.signal(9)


@pytest.mark.parametrize("rehearsals", [0, 2])
async def test_user_code_sees_what_it_sees_in_a_new_kernel_but_for_modules(
    standing_by: Agent, client: AgentClient, home: Path, rehearsals: int
) -> None:
    (home / "work").mkdir()
    for _ in range(rehearsals):
        assert standing_by.ask("rehearse")[0] == {"ok": True}
    adopted = await seen_by_user_code(standing_by, client, home, cwd=str(home / "work"))
    with short_folder() as other, reaped() as children:
        (other / "work").mkdir()
        plain = Agent(children, settings_for(other))
        connection = plain.connect()
        connection.setblocking(False)
        another = AgentClient(connection)
        fresh = await seen_by_user_code(plain, another, other, cwd=str(other / "work"))
        await another.aclose()
    assert set(fresh["modules"]) - set(adopted["modules"]) == set()
    assert "colorsys" in adopted["modules"]
    assert not {"standby", "kernel", "agent_protocol"} & set(adopted["modules"])
    del fresh["modules"], adopted["modules"]
    assert json.loads(json.dumps(adopted).replace(str(home), "~")) == json.loads(
        json.dumps(fresh).replace(str(other), "~")
    )


async def test_it_is_the_same_process_with_another_key(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    waiting = standing_by.operations.standby
    assert waiting is not None
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION)
    assert (started.pid, started.adopted) == (waiting._kernel.pid, True)
    kernel = jupyter(standing_by, home)  # which checks signatures
    try:
        written = run(kernel, "import ipykernel; print(ipykernel.get_connection_info())")
        assert json.loads(written)["key"] == CONNECTION["key"]
    finally:
        kernel.stop_channels()
        await client.signal(9)


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        ([*ARGV, "--debug"], {}),
        (ARGV, {"PYTHONHASHSEED": "0"}),
    ],
)
async def test_what_it_cannot_become_is_started_anew(
    standing_by: Agent, client: AgentClient, home: Path, argv: list[str], environment: dict[str, str]
) -> None:
    waiting = standing_by.operations.standby
    assert waiting is not None
    started = await client.start(argv, ENVIRONMENT | environment, CONNECTION)
    assert not started.adopted
    assert started.pid != waiting._kernel.pid
    assert not waiting._kernel.alive
    kernel = jupyter(standing_by, home)
    try:
        assert run(kernel, "import sys; print('colorsys' in sys.modules)") == "False"
    finally:
        kernel.stop_channels()
        await client.signal(9)


async def test_a_kernel_that_cannot_change_its_identity_is_not_used(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    waiting = standing_by.operations.standby
    assert waiting is not None
    # No signature scheme of this name exists, so a new kernel ends as well: but it is a new one.
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION | {"signature_scheme": "hmac-none"})
    assert not started.adopted
    assert started.pid != waiting._kernel.pid
    assert not waiting._kernel.alive


async def test_a_rehearsal_is_of_an_identity_that_is_thrown_away(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    keys = {kernel_key(standing_by)}
    for _ in range(2):
        await client.call("rehearse")
        keys.add(kernel_key(standing_by))
    assert len(keys) == 3
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION)
    assert started.adopted
    assert kernel_key(standing_by) == CONNECTION["key"]
    kernel = jupyter(standing_by, home)  # which checks signatures
    try:
        session = "me = get_ipython().kernel.session; print(me.key.decode(), len(me.digest_history))"
        key, requests = run(kernel, session).split()
        assert key == CONNECTION["key"]
        assert int(requests) < 10
    finally:
        kernel.stop_channels()
        await client.signal(9)


def kernel_key(agent: Agent) -> object:
    return json.loads(Path(agent.settings.run, "connection.json").read_text())["key"]


async def test_nothing_is_rehearsed_once_the_kernel_is_somebodys(
    standing_by: Agent, client: AgentClient
) -> None:
    await client.start(ARGV, ENVIRONMENT, CONNECTION)
    assert standing_by.ask("rehearse")[0]["error"] == "no standby"
    await client.signal(9)


async def test_a_kernel_that_dies_while_it_stands_by_is_replaced(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    waiting = standing_by.operations.standby
    assert waiting is not None
    waiting._kernel.signal(9)
    with pytest.raises(GuestError, match="has ended"):
        await client.call("rehearse")
    assert standing_by.ask("rehearse")[0]["error"] == "no standby"
    assert not (await client.start(ARGV, ENVIRONMENT, CONNECTION)).adopted
    kernel = jupyter(standing_by, home)
    try:
        assert run(kernel, "print(6 * 7)") == "42"
    finally:
        kernel.stop_channels()
        await client.signal(9)


async def test_a_template_rehearses_as_its_clones_will_be_asked_to(
    standing_by: Agent, client: AgentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(system, "add_entropy", lambda data: done.append("entropy"))
    monkeypatch.setattr(system, "new_identity", lambda: done.append("identity"))
    monkeypatch.setattr(cgroup, "limit_pids", lambda settings, count: done.append("pids"))
    monkeypatch.setattr(time, "clock_settime_ns", lambda clock, value: done.append("clock"))
    assert template.rehearse(standing_by.server)
    times, each = divmod(len(done), 4)
    assert each == 0
    assert done == ["clock", "entropy", "identity", "pids"] * times
    waiting = standing_by.operations.standby
    assert waiting is not None
    waiting._kernel.signal(9)
    assert not template.rehearse(standing_by.server)


async def test_an_order_that_cannot_be_written_down_leaves_the_kernel_standing_by(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        standing_by.operations._adopt(Order(ARGV, ENVIRONMENT, str(home), {"key": deep}))
    assert (await client.start(ARGV, ENVIRONMENT, CONNECTION)).adopted
    await client.signal(9)


async def test_a_line_that_is_cut_off_ends_the_kernel_and_not_the_agent(
    standing_by: Agent, client: AgentClient
) -> None:
    waiting = standing_by.operations.standby
    assert waiting is not None
    waiting._line.sendall(b"{nonsense\n")
    assert not waiting.until_ready()
    assert not (await client.start(ARGV, ENVIRONMENT, CONNECTION)).adopted
    await client.signal(9)


async def test_every_change_of_identity_draws_new_random_numbers(
    standing_by: Agent, client: AgentClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(system, "add_entropy", lambda data: done.append(f"entropy {data!r}"))
    monkeypatch.setattr(system, "new_identity", lambda: done.append("identity"))
    monkeypatch.setattr(cgroup, "limit_pids", lambda settings, count: done.append(f"pids {count}"))
    monkeypatch.setattr(cgroup, "limit_memory", lambda settings, count: done.append(f"memory {count}"))
    monkeypatch.setattr(time, "clock_settime_ns", lambda clock, value: done.append(f"clock {value}"))
    configuration = Configuration(5, socket.gethostname(), b"one", 99, 7)
    everything = ["clock 5", "entropy b'one'", "identity", "pids 99", "memory 7"]
    await client.rehearse(configuration)
    assert done == everything
    await client.rehearse(configuration)
    started = await client.start(ARGV, ENVIRONMENT, CONNECTION, configuration=configuration)
    assert started.adopted
    assert done == everything * 3
    with pytest.raises(GuestError, match="started already"):
        await client.start(ARGV, ENVIRONMENT, CONNECTION, configuration=configuration)
    assert done == everything * 3
    await client.signal(9)


def test_a_template_is_asked_for_on_the_command_line() -> None:
    word = "sandbox.template=" + json.dumps({"modules": ["numpy"]}).encode().hex()
    wished = wish(f"console=ttyS0 {word} quiet")
    assert wished is not None
    assert (wished.modules, wished.network) == (["numpy"], None)
    assert wish("console=ttyS0 quiet") is None


def test_a_template_with_a_network_is_told_its_addresses() -> None:
    word = "sandbox.template=" + json.dumps({"modules": [], "network": LINKS}).encode().hex()
    wished = wish(word)
    assert wished is not None
    assert wished.network is not None
    nobody = (
        "sandbox.template=" + json.dumps({"modules": [], "network": {"ipv4": {"prefix": 33}}}).encode().hex()
    )
    with pytest.raises(ValueError, match="prefix"):
        wish(nobody)
