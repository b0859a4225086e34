"""Percentiles, medians, ratios and how they are shown."""

from __future__ import annotations

import pytest

from bench import figures, report
from bench.figures import Figure, Sample
from bench.machine import Machine

MACHINE = Machine("CPU", 2, "Debian", "6.1", "3.11", "7.4", "7.2", "tcg")


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.0),
        ([float(value) for value in range(1, 101)], 99, 99.0),
        ([float(value) for value in range(1, 102)], 99, 100.0),
        ([1.0, 2.0], 0, 1.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_a_percentile_is_one_of_the_values(values: list[float], percent: float, expected: float) -> None:
    assert figures.percentile(values, percent) == expected


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_or_beyond_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        figures.percentile(values, percent)


def test_a_figure_is_the_median_of_the_turns() -> None:
    samples = [Sample("start", "s", (value,)) for value in (9.0, 1.0, 2.0)]
    assert figures.summarise(samples) == {"start": Figure("s", 2.0, 1.0, 9.0, 3)}


def test_a_percentile_is_of_all_turns_together() -> None:
    turns = [Sample("trip", "s", (1.0,) * 99, percentile=99), Sample("trip", "s", (7.0,) * 2, percentile=99)]
    assert figures.summarise(turns)["trip"].value == 7.0
    assert figures.summarise(turns[:1])["trip"].value == 1.0


def test_a_missing_figure_has_no_ratio() -> None:
    one, nothing = Figure("s", 2.0, 2.0, 2.0, 1), Figure("s", 0.0, 0.0, 0.0, 1)
    assert figures.ratio(one, Figure("s", 0.5, 0.5, 0.5, 1)) == 4.0
    assert figures.ratio(one, None) is None
    assert figures.ratio(None, one) is None
    assert figures.ratio(one, nothing) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00812, "s", "8.12 ms"),
        (0.0000042, "s", "4.20 µs"),
        (3.05, "s", "3.05 s"),
        (12.34, "s", "12.3 s"),
        (0.512, "s", "512 ms"),
        (138.2, "MiB", "138 MiB"),
        (0.5, "MiB", "0.50 MiB"),
    ],
)
def test_a_figure_is_shown_in_a_unit_that_suits(value: float, unit: str, text: str) -> None:
    assert figures.shown(Figure(unit, value, value, value, 1)) == text


def test_the_readmes_table_has_a_ratio_against_the_first_kernel() -> None:
    plain = {"start": Figure("s", 0.5, 0.5, 0.5, 3)}
    vm = {"start": Figure("s", 10.0, 9.0, 11.0, 3), "extra": Figure("s", 1.0, 1.0, 1.0, 3)}
    text = report.markdown({"python3": plain, "python3-microvm": vm}, MACHINE, 3)
    assert text.splitlines()[:4] == [
        "|  | python3 | python3-microvm | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| start | 500 ms | 10.0 s | 20.0 |",
        "| extra | – | 1.00 s | – |",
    ]
    assert "accelerator tcg" in text.splitlines()[-1]


def test_more_than_two_kernels_get_a_ratio_each() -> None:
    figure = {"start": Figure("s", 1.0, 1.0, 1.0, 1)}
    headings, rows = report.cells({"a": figure, "b": figure, "c": figure})
    assert headings == ["", "a", "b", "c", "b / a", "c / a"]
    assert rows == [["start", "1.00 s", "1.00 s", "1.00 s", "1.00", "1.00"]]


def test_the_document_for_machines_carries_ratios_and_the_device() -> None:
    figure = {"start": Figure("s", 1.0, 1.0, 1.0, 1)}
    found = report.document({"a": figure, "b": figure}, MACHINE, 2, {"bytes": 1})
    assert found["kernels"]["b"]["start"]["ratio"] == 1.0
    assert (found["yardstick"], found["repeat"], found["vsock_device"]) == ("a", 2, {"bytes": 1})
