"""A template's kernel: started and warm before anybody has asked for it, a stranger's afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from children import Children
from sandbox_kernel.agent.client import AgentClient
from template import Standby, modules_wanted
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
    await client.start(ARGV, ENVIRONMENT, CONNECTION, **options)
    kernel = jupyter(agent, home)
    try:
        found: dict[str, Any] = json.loads(run(kernel, LOOK))
        return found
    finally:
        kernel.stop_channels()
        await client.signal(9)


async def test_user_code_sees_what_it_sees_in_a_new_kernel_but_for_modules(
    standing_by: Agent, client: AgentClient, home: Path
) -> None:
    (home / "work").mkdir()
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
    pid = await client.start(ARGV, ENVIRONMENT, CONNECTION)
    assert pid == waiting._kernel.pid
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
    pid = await client.start(argv, ENVIRONMENT | environment, CONNECTION)
    assert pid != waiting._kernel.pid
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
    pid = await client.start(ARGV, ENVIRONMENT, CONNECTION | {"signature_scheme": "hmac-none"})
    assert pid != waiting._kernel.pid
    assert not waiting._kernel.alive


def test_a_template_is_asked_for_on_the_command_line() -> None:
    word = "sandbox.template=" + json.dumps({"modules": ["numpy"]}).encode().hex()
    assert modules_wanted(f"console=ttyS0 {word} quiet") == ["numpy"]
    assert modules_wanted("console=ttyS0 quiet") is None
