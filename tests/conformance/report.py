"""What a run of the suites says to a person (a table) and to a machine (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.conformance.baseline import Score
from tests.conformance.leftovers import Leftovers
from tests.conformance.outcome import Verdict


def good(verdicts: Mapping[str, Verdict], left: Mapping[str, Leftovers]) -> bool:
    """Whether the run succeeded."""
    return all(verdict.good for verdict in verdicts.values()) and all(found.clean for found in left.values())


def table(verdicts: Mapping[str, Verdict], stock: Mapping[str, Score], target: str) -> Table:
    """A suite a line, the stock score at the end."""
    made = Table(title=f"Jupyter's own suites, target {target}", title_justify="left")
    made.add_column("suite", no_wrap=True)
    for heading in ("passed", "failed", "expected", "skipped", "unexpected", "stale", "seconds", "stock"):
        made.add_column(heading, justify="right")
    for name, verdict in verdicts.items():
        made.add_row(
            name,
            str(verdict.passed),
            str(verdict.failed),
            str(len(verdict.expected)),
            str(verdict.skipped),
            _alarming(len(verdict.unexpected)),
            _alarming(len(verdict.stale)),
            f"{verdict.seconds:.0f}",
            shown(stock[name]) if name in stock else "not recorded",
        )
    return made


def shown(score: Score) -> str:
    """A score in a few characters: `30 + 5 skipped, 61 s`."""
    words = [str(score.passed)]
    words += [f"{score.failed} failed"] if score.failed else []
    words += [f"{score.skipped} skipped"] if score.skipped else []
    return f"{' + '.join(words)}, {score.seconds:.0f} s"


def complaints(verdicts: Mapping[str, Verdict], left: Mapping[str, Leftovers]) -> list[str]:
    """A paragraph for everything that fails the run."""
    said = []
    for name, verdict in verdicts.items():
        for result in verdict.unexpected:
            said.append(f"unexpected failure in {name}: {result.id}\n{_indented(result.detail)}")
        for entry in verdict.stale:
            said.append(
                f"stale entry for {name}: {entry.test} does not fail; take it off the list of "
                "expected failures, or say there why it is flaky"
            )
    for name, found in left.items():
        said += [f"{name} left a process: {command}" for command in found.processes]
        said += [f"{name} left a file: {path}" for path in found.files]
    return said


def document(
    verdicts: Mapping[str, Verdict], left: Mapping[str, Leftovers], stock: Mapping[str, Score], target: str
) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "target": target,
        "good": good(verdicts, left),
        "suites": {
            name: asdict(verdict)
            | {
                "failed": verdict.failed,
                "good": verdict.good,
                "stock": asdict(stock[name]) if name in stock else None,
                "left": asdict(left[name]),
            }
            for name, verdict in verdicts.items()
        },
    }


def say(console: Console, said: list[str]) -> None:
    """Prints complaints."""
    for paragraph in said:
        console.print(escape(paragraph), style="red", highlight=False, soft_wrap=True)


def _alarming(number: int) -> str:
    return f"[red]{number}[/red]" if number else "0"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
