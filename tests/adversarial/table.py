"""The table of attacks and outcomes in docs/limits.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.adversarial.case import Outcome

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
HEAD = (
    "| attack | limit | outcome | time to control, restored · cold | neighbour's p99, restored · cold |\n"
    "| --- | --- | --- | --- | --- |\n"
)
_LONGEST = 160


def write(place: Path, outcomes: Sequence[Outcome]) -> None:
    """Puts the rows of these outcomes into the table in the document `place`; others stay as they are."""
    text = place.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {row.split(" | ")[0]: row for row in table.splitlines()[2:]}
    rows |= {row.split(" | ")[0]: row for row in render(outcomes)}
    place.write_text(before + BEGIN + HEAD + "".join(f"{row}\n" for row in rows.values()) + END + after)


def render(outcomes: Sequence[Outcome]) -> list[str]:
    """The rows, one a case, in the order of the first outcomes."""
    rows = []
    cases = {outcome.case.name: outcome.case for outcome in outcomes}
    for name, case in cases.items():
        mine = {outcome.start: outcome for outcome in outcomes if outcome.case.name == name}
        both = [mine[start] for start in ("restored", "cold") if start in mine]
        rows.append(
            f"| {name} | {case.limit} | {_words(both[0].seen)} "
            f"| {' · '.join(f'{one.control:.1f} s' for one in both)} "
            f"| {' · '.join(f'{one.meanwhile / one.quiet:.1f}' for one in both)} |"
        )
    return rows


def _words(seen: str) -> str:
    """What was seen, without what differs each time, in a table's cell."""
    text = re.sub(r" \((console|logs): .*", ".", seen)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(letter if letter.isprintable() else "�" for letter in text).replace("|", "\\|")
