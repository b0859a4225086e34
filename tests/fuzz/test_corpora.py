"""Each run of the kept corpora, once, without the fuzzer: what was found once stays found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import corpus, targets
from tests.fuzz.script import Script, write


@pytest.mark.parametrize("name", targets.NAMES)
def test_a_kept_corpus_has_no_finding(name: str) -> None:
    runs = corpus.runs(corpus.kept(name))
    with targets.load(name).fuzzing() as run:
        for data in runs:
            run(data)


@pytest.mark.parametrize("name", targets.NAMES)
def test_the_seeds_have_no_finding(name: str) -> None:
    module = targets.load(name)
    with module.fuzzing() as run:
        for data in module.seeds():
            run(data)


@pytest.mark.parametrize("name", targets.NAMES)
def test_a_kept_corpus_is_small(name: str) -> None:
    sizes = [len(run) for run in corpus.runs(corpus.kept(name))]
    assert 0 < len(sizes) <= corpus.MOST_FILES
    assert sum(sizes) <= corpus.MOST_BYTES


@pytest.mark.parametrize("name", targets.NAMES)
def test_a_run_leaves_nothing_open(name: str) -> None:
    """What one leaves is the next one's surprise, and ten million runs have few files."""
    runs = corpus.runs(corpus.kept(name))
    with targets.load(name).fuzzing() as run:
        run(runs[0])
        before = open_files()
        for data in runs:
            run(data)
        assert open_files() == before


def open_files() -> set[str]:
    return {file.name for file in Path("/proc/self/fd").iterdir()}


def test_a_script_gives_what_was_written() -> None:
    values = (0, 247, 248, 65_535, 65_536, 1 << 32, (1 << 64) - 1)
    script = Script(write(*values, b"text", 3))
    assert tuple(script.number() for _ in values) == values
    assert script.string() == b"text"
    assert script.more() and script.number() == 3
    assert not script.more() and script.number() == 0 and script.string() == b""
