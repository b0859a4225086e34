"""What a run says."""

from __future__ import annotations

from rich.console import Console

from tests.conformance import report
from tests.conformance.baseline import Score
from tests.conformance.leftovers import Leftovers
from tests.conformance.outcome import Expectation, Result, judge

FAILED = Result("t.py::test[a]", "failed", 1.0, "assert [/red] == 2")
STALE = Expectation("s", "t.py::test_ok", "no files")
VERDICT = judge([FAILED, Result("t.py::test_ok", "passed")], [STALE], 61.4)


def test_the_table_has_the_stock_score_beside_ours() -> None:
    console = Console(width=120, record=True, file=None, quiet=True)
    text = "".join(
        segment.text
        for segment in console.render(report.table({"s": VERDICT}, {"s": Score(2, 0, 1, 12.2)}, "microvm"))
    )
    (row,) = [line for line in text.splitlines() if line.startswith("│ s ")]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["s", "1", "1", "0", "0", "1", "1", "61", "2 + 1 skipped, 12 s"]


def test_each_reason_for_failing_is_told() -> None:
    left = {"s": Leftovers(processes=("qemu-system-x86_64 -M pc",), files=("/run/sandbox-kernel/1",))}
    said = report.complaints({"s": VERDICT}, left)
    assert [paragraph.split(":")[0] for paragraph in said] == [
        "unexpected failure in s",
        "stale entry for s",
        "s left a process",
        "s left a file",
    ]
    assert "    assert [/red] == 2" in said[0]


def test_a_run_is_good_only_when_nothing_of_ours_is_left() -> None:
    fine = judge([Result("t", "passed")], [], 1.0)
    assert report.good({"s": fine}, {"s": Leftovers(strangers=("sleep 9",))})
    assert not report.good({"s": fine}, {"s": Leftovers(files=("x",))})
    assert not report.good({"s": VERDICT}, {"s": Leftovers()})


def test_the_document_for_machines_agrees_with_the_table() -> None:
    found = report.document({"s": VERDICT}, {"s": Leftovers()}, {}, "microvm")
    assert found["good"] is False
    assert found["suites"]["s"]["unexpected"][0]["id"] == "t.py::test[a]"
    assert found["suites"]["s"]["stock"] is None
