"""What stock ipykernel scores in each suite: recorded once with `--target stock --record-baseline`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conformance.lock import FOLDER
from tests.conformance.outcome import Verdict

FILE = FOLDER / "baseline.toml"
_HEAD = """\
# What stock ipykernel scores, for the table to show beside the micro-VM's score. Written by
#   python -m tests.conformance --target stock --record-baseline
"""


@dataclass(frozen=True)
class Score:
    """How many tests of a suite passed, failed and were skipped, and the seconds it took."""

    passed: int
    failed: int
    skipped: int
    seconds: float

    @property
    def total(self) -> int:
        """Tests, however they ended."""
        return self.passed + self.failed + self.skipped


def score(verdict: Verdict) -> Score:
    """The numbers of a verdict."""
    return Score(verdict.passed, verdict.failed, verdict.skipped, round(verdict.seconds, 1))


def read(text: str) -> dict[str, Score]:
    """Scores by suite, from the text of a `baseline.toml`."""
    return {name: Score(**values) for name, values in tomllib.loads(text).items()}


def write(scores: Mapping[str, Score]) -> str:
    """The text of a `baseline.toml`; `read` is its inverse."""
    blocks = []
    for name, value in scores.items():
        rows = "".join(f"{key} = {number}\n" for key, number in asdict(value).items())
        blocks.append(f"\n[{json.dumps(name)}]\n{rows}")
    return _HEAD + "".join(blocks)


def load(path: Path = FILE) -> dict[str, Score]:
    """The recorded scores; empty when nothing was recorded yet."""
    return read(path.read_text()) if path.exists() else {}
