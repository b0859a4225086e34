"""What docs/network.md says of its commands, each run as it stands there, by the world's ordinary user."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.network.conftest import World

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "network.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
POLICIES = [block for block in BLOCKS if "nbconvert" in block]
OTHERS = [line for block in BLOCKS if block not in POLICIES for line in block.splitlines()]
MODES = ("none", "allowlist", "public", "full")


def promised(mode: str) -> dict[str, str]:
    """What the document's table says of each place under a policy."""
    head, _, *body = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in DOCUMENT.splitlines()
        if line.startswith(
            ("| | `none`", "| pypi", "| files", "| example", "| 10.", "| --- | --- | --- | --- |")
        )
    ]
    return {row[0]: row[head.index(mode)] for row in body}


@pytest.fixture(scope="module")
def user(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An ordinary user's world, without a kernel yet."""
    made = World(tmp_path_factory.mktemp("documented"), "ordinary")
    yield made
    made.close()


def type_in(world: World, command: str) -> str:
    """What it says; the environment's programs are found first."""
    return world.shell(
        f"cd '{ROOT}' && {command}", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )


def test_the_notebook_is_the_cell_that_the_document_shows() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "network.ipynb", as_version=4)
    [cell] = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (shown,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert cell.strip() == shown.strip()


def test_there_is_a_command_for_each_policy() -> None:
    assert [mode for mode in MODES if sum(f"NETWORK={mode} " in block for block in POLICIES) != 1] == []
    assert len(POLICIES) == len(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_the_documents_command_reaches_what_its_table_says(user: World, mode: str) -> None:
    [block] = [block for block in POLICIES if f"NETWORK={mode} " in block]
    said = type_in(user, block)
    assert dict(re.findall(r"^ +(\S+): (reached|not reached)", said, re.MULTILINE)) == promised(mode)
    # Without a network there is nobody who could refuse.
    assert (f"The network policy ({mode}) refused" in said) == (mode in ("allowlist", "public"))


def test_the_documents_commands_on_a_running_kernel_do_what_it_says(user: World) -> None:
    [logs, show, allow, forget, public] = OTHERS
    vm = user.start(network="allowlist", network_allow=["pypi.org:443"])

    def do(command: str) -> dict[str, str]:
        said = type_in(user, re.sub(r"\bVM\b", vm, command))
        return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in said.splitlines()}

    assert user.value("reach('example.org', 443)") == "gaierror"
    assert "  example.org  no rule allows this name; add it to `network_allow`  [name;" in type_in(
        user, logs.replace("VM", vm)
    )
    assert do(show)["network_allow"] == "pypi.org:443"
    assert do(allow)["network_allow"] == "pypi.org:443 example.org:443"
    assert user.value("reach('example.org', 443)") == "93.184.216.34 443"
    assert do(forget)["network_allow"] == "pypi.org:443"
    assert user.value("reach('example.org', 443)") == "gaierror"
    assert do(public)["network"] == "public"
    assert user.value("reach('93.184.216.99', 443)") == "ConnectionRefusedError"
    assert user.value("reach('pypi.org', 443)") == "151.101.64.223 443"


def test_the_sentence_of_a_refusal_is_the_one_that_the_document_shows(user: World) -> None:
    (shown,) = re.findall(r"^    (The network policy .*)$", DOCUMENT, re.MULTILINE)
    user.policy("allowlist", ("pypi.org",))
    assert shown in user.run("look_up('example.org')")


def test_a_service_of_the_host_is_where_the_document_says(user: World) -> None:
    """At the ports of its example, less those that only root may listen on."""
    assert '"host_services": ["5432", "8000:80"]' in DOCUMENT
    assert user.host("listen('127.0.0.1', 5432)")
    assert user.host("listen('127.0.0.1', 8080)")
    user.start(network="allowlist", host_services=["5432", "8000:8080"])
    assert user.value("reach('host.internal', 5432)") == "the host's 5432"
    assert user.value("reach('host.internal', 8000)") == "the host's 8080"
    assert user.value("reach('host.internal', 8080)") == "ConnectionRefusedError"
