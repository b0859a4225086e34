"""`sandbox-kernel cp`: its arguments, and what it says."""

from __future__ import annotations

import io

import pytest
from click.testing import CliRunner
from rich.console import Console

from sandbox_kernel.agent.tree import Tally
from sandbox_kernel.cli.copy import size, split
from sandbox_kernel.cli.main import main
from sandbox_kernel.cli.progress import transfer


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("vm1:data/x", ("vm1", "data/x")),
        ("vm1:", ("vm1", "")),
        (":data", ("", "data")),
        ("vm1:a:b", ("vm1", "a:b")),
        ("data", (None, "data")),
        ("./a:b", (None, "./a:b")),
        ("/tmp/a:b", (None, "/tmp/a:b")),
    ],
)
def test_what_stands_before_a_colon_is_a_vm(argument: str, parts: tuple[str | None, str]) -> None:
    assert split(argument) == parts


@pytest.mark.parametrize("arguments", [("a", "b"), ("vm:a", "vm:b"), ("./x:y", "z")])
def test_one_side_is_a_vms_and_the_other_one_this_hosts(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, ("cp", *arguments))
    assert result.exit_code == 1
    assert result.stderr == (
        "sandbox-kernel: One of the two is in a VM, written VM:PATH, and the other one on this host; write a "
        "local name that has a colon in it as ./NAME.\n"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (5_250_000_000, "5.2 GB")],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_progress_is_shown_on_a_terminal_and_nowhere_else() -> None:
    tally = Tally()
    tally.place, tally.size, tally.expected = "a/b\x1b[2J", 500_000, 1_000_000
    text = io.StringIO()
    with transfer(Console(file=text, force_terminal=True, width=120), "source") as watch:
        assert watch is not None
        watch(tally)
    assert "a/b [2J" in text.getvalue()
    assert "0.5/1.0 MB" in text.getvalue()
    with transfer(Console(file=io.StringIO()), "source") as watch:
        assert watch is None
