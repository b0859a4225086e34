"""The table of attacks and outcomes in docs/limits.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.adversarial.case import Outcome

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
HEAD = "| attack | limit | outcome | time to control, restored · cold | neighbour's p99, restored · cold |"


def write(place: Path, outcomes: Sequence[Outcome]) -> None:
    """Replaces the table in the document `place`."""
    text = place.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    place.write_text(before + BEGIN + render(outcomes) + END + after)


def render(outcomes: Sequence[Outcome]) -> str:
    """The table; a row a case, in the order of the first outcomes."""
    rows = [HEAD, "| --- | --- | --- | --- | --- |"]
    cases = {outcome.case.name: outcome.case for outcome in outcomes}
    for name, case in cases.items():
        mine = {outcome.start: outcome for outcome in outcomes if outcome.case.name == name}
        both = [mine[start] for start in ("restored", "cold") if start in mine]
        rows.append(
            f"| {name} | {case.limit} | {both[0].seen} "
            f"| {' · '.join(f'{one.control:.1f} s' for one in both)} "
            f"| {' · '.join(f'{one.meanwhile / one.quiet:.1f}' for one in both)} |"
        )
    return "\n".join(rows) + "\n"
