"""The figures of a crowd that grows, when it stops, and what the picture shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import growth
from bench.density import main
from bench.growth import AtOnce, Growth, Point
from bench.picture import draw, memory_line, start_line

GROWN = Growth(
    "python3-microvm",
    [Point(1, 160.0, 170.0, 180.0, 3.0), Point(10, 1024.0, 1100.0, 1200.0, 12.4)],
    [1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 2.0, 9.0, 2.0],
    trips=[0.04, 0.04, 0.05],
    end="10 were wanted",
)


@pytest.mark.parametrize(
    ("count", "available", "last_start", "said"),
    [
        (5, 9000.0, 1.0, ""),
        (10, 9000.0, 1.0, "10 were wanted"),
        (5, 1500.0, 1.0, ""),
        (5, 1499.0, 1.0, "only 1499 of 10000 MiB"),
        (5, 9000.0, 30.0, ""),
        (5, 9000.0, 30.1, "start 5 took 30 s"),
    ],
)
def test_a_crowd_stops_at_the_limit_short_of_memory_or_when_starts_get_slow(
    count: int, available: float, last_start: float, said: str
) -> None:
    found = growth.enough(count, 10, available, 10_000.0, last_start)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_the_start_of_the_nth_is_a_median_of_three_and_compared_with_the_first_three() -> None:
    assert [GROWN.start_of(count) for count in (1, 2, 4, 10)] == [1.0, 1.0, 1.0, 2.0]
    assert GROWN.slower(10) == 2.0


def test_the_document_has_the_figures_per_kernel() -> None:
    found = json.loads(json.dumps(GROWN.document()))
    assert found["label"] == "python3-microvm"
    assert found["points"][1]["unique_each"] == 102.4
    assert found["points"][1]["pss_each"] == 110.0
    assert (found["points"][1]["start"], found["points"][1]["slower_than_first"]) == (2.0, 2.0)


def test_the_table_and_what_stands_below_it() -> None:
    columns = [list(column.cells) for column in growth.table(GROWN).columns]
    row = ["10", "2.00 s", "102 MiB", "110 MiB", "120 MiB", "12 % of a core"]
    assert [column[1] for column in columns] == row
    assert growth.lines(GROWN) == [
        "python3-microvm: start 10 / first start: 2.00",
        "python3-microvm: with 10 alive 3 have answered 1+1 with 2: median 40.0 ms, p99 50.0 ms",
        "python3-microvm: no more than 10, because 10 were wanted.",
    ]


def test_many_starts_on_one_line() -> None:
    line = AtOnce("python3", 2.5, (1.0, 2.0, 2.25)).line()
    assert line == "3 starts of python3 at once: all have answered after 2.50 s, each after 2.00 s (median)"


def test_a_running_median_ignores_a_single_outlier() -> None:
    assert growth.running_median([1.0, 1.0, 9.0, 1.0], 3) == [1.0, 1.0, 1.0, 1.0]


def test_the_pictures_lines_are_the_figures() -> None:
    assert memory_line(GROWN) == ([0.0, 1.0, 10.0], [0.0, 0.15625, 1.0])
    numbers, seconds = start_line(GROWN)
    assert (numbers[0], numbers[-1], seconds[3]) == (1.0, 10.0, 1.0)


@pytest.mark.parametrize(("ending", "beginning"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_is_written_as_its_name_says(tmp_path: Path, ending: str, beginning: bytes) -> None:
    file = tmp_path / f"density.{ending}"
    draw([Growth("python3"), GROWN], file)
    assert file.read_bytes().startswith(beginning)


@pytest.mark.parametrize("counts", ["", "1,x", "0,1", "-3"])
def test_counts_that_are_none_are_refused(counts: str) -> None:
    done = CliRunner().invoke(main, ["--counts", counts])
    assert done.exit_code == 2
    assert "such as 1,10,50" in done.output
