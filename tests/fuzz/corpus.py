"""Where the runs are kept that lead a target deep: `corpus/TARGET` in the repository, finds in `.cache/fuzz`.

A file is one run, named by its content. `python -m tests.fuzz TARGET --minimise` makes the kept ones anew,
from the seeds, those kept and the finds: as few and as small as reach the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 200
MOST_BYTES = 200 * 1024


def kept(target: str) -> Path:
    """The folder of the repository's corpus."""
    return ROOT / "tests" / "fuzz" / "corpus" / target


def found(target: str) -> Path:
    """The folder of what the fuzzer found on this machine."""
    return ROOT / ".cache" / "fuzz" / target


def runs(folder: Path) -> list[bytes]:
    """The runs in a folder, smallest first."""
    return sorted((file.read_bytes() for file in folder.glob("*")), key=lambda run: (len(run), run))


def save(folder: Path, data: Iterable[bytes]) -> None:
    """Puts runs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in data:
        (folder / hashlib.sha1(run, usedforsecurity=False).hexdigest()).write_bytes(run)
