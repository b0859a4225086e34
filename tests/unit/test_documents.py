"""What the documents say of the code: files they name exist, tables they show are the code's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sandbox_kernel import policy
from sandbox_kernel.spec import CAPS, from_environment, keys_with_defaults, resolve

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *("README.md", "ARCHITECTURE.md", "SPECIFICATION.md", "SECURITY.md", "CHANGELOG.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
BEGINNINGS = ("sandbox_kernel/", "guest/", "kernelspecs/", "tests/", "notebooks/", "bench/", "docs/")


def rows(document: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = (ROOT / document).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = [word for word in re.findall(r"`([^`\s]+)`", text) if word.startswith(BEGINNINGS)]
    assert [name for name in named if not list(ROOT.glob(name))] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each.startswith("docs/")])
def test_every_configuration_that_a_document_shows_is_accepted(document: str) -> None:
    for block in re.findall(r"```json\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        resolve([(document, json.loads(f"{{{block}}}")["config"])])


def test_a_policy_is_the_same_in_a_kernelspec_and_in_the_environment() -> None:
    text = (ROOT / "docs" / "network.md").read_text()
    shown = re.findall(r"```json\n([^`]*)```\n\n```sh\n([^`]*nbconvert[^`]*)```", text)
    assert len(shown) == len(policy.MODES)
    for block, commands in shown:
        variables = {
            name: quoted or plain
            for name, quoted, plain in re.findall(r'(SANDBOX_KERNEL_\w+)=(?:"([^"]*)"|(\S+))', commands)
        }
        kernelspec = resolve([("kernelspec", json.loads(f"{{{block}}}")["config"])])
        assert kernelspec == resolve([("environment", from_environment(variables))])


def test_every_network_rule_that_is_explained_is_one() -> None:
    rules = [row[0].strip("`") for row in rows("docs/network.md") if len(row) == 2 and row[0].startswith("`")]
    rules = [rule for rule in rules if rule not in policy.MODES]
    assert len(rules) == 6
    assert [policy.parse(rule).protocols for rule in rules][2::3] == [("tcp",), ("icmp",)]


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = [
        path.name + "/" * path.is_dir()
        for path in (ROOT / "sandbox_kernel").iterdir()
        if not path.name.startswith(("_", ".")) and (path.is_dir() or path.suffix == ".py")
    ]
    assert [room for room in rooms if f"sandbox_kernel/{room}`" not in text and f"`{room}`" not in text] == []


def test_the_readme_lists_every_key_with_its_default() -> None:
    listed = {row[0].strip("`"): row[1].strip("`") for row in rows("README.md") if len(row) == 3}
    for key, default in keys_with_defaults():
        assert listed[key.name] == (
            "none" if default == () else f"{default:g}" if key.kind is float else str(default)
        )
    text = (ROOT / "README.md").read_text()
    assert [cap for cap in CAPS if f"`{cap}`" not in text] == []


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\nmake test " in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()[-1]
