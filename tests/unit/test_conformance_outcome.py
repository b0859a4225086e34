"""Suites' reports held against the list of expected failures."""

from __future__ import annotations

import json

import pytest

from tests.conformance.outcome import (
    INCOMPLETE,
    Expectation,
    Result,
    judge,
    parse_expectations,
    read_reports,
)

GOOD = Result("tests/test_a.py::test_good", "passed", 1.0)
BAD = Result("tests/test_a.py::test_bad[x-1]", "failed", 2.0, "boom")
SKIPPED = Result("tests/test_a.py::test_elsewhere", "skipped")


def entry(test: str, **more: str) -> Expectation:
    return Expectation("a", test, "needs the host's files", **more)


def report(test: str, when: str, outcome: str = "passed", seconds: float = 0.25, detail: str = "") -> str:
    return json.dumps(
        {
            "event": "report",
            "id": test,
            "when": when,
            "outcome": outcome,
            "seconds": seconds,
            "detail": detail,
        }
    )


def event(name: str, **more: object) -> str:
    return json.dumps({"event": name, **more})


def whole_test(test: str, outcome: str = "passed") -> list[str]:
    return [
        event("start", id=test),
        report(test, "setup"),
        report(test, "call", outcome),
        report(test, "teardown"),
    ]


def test_a_failure_that_no_entry_explains_is_unexpected() -> None:
    verdict = judge([GOOD, BAD, SKIPPED], [], 3.0)
    assert (verdict.passed, verdict.failed, verdict.skipped) == (1, 1, 1)
    assert verdict.unexpected == (BAD,)
    assert not verdict.good


def test_a_listed_failure_lets_the_suite_succeed() -> None:
    verdict = judge([GOOD, BAD], [entry(BAD.id)], 3.0)
    assert verdict.expected == (BAD,)
    assert verdict.good


def test_a_listed_failure_that_passes_is_stale() -> None:
    listed = entry(GOOD.id)
    verdict = judge([GOOD], [listed], 1.0)
    assert verdict.stale == (listed,)
    assert not verdict.good


def test_a_flaky_entry_may_pass_and_may_fail() -> None:
    for result in (GOOD, Result(GOOD.id, "failed")):
        assert judge([result], [entry(GOOD.id, flaky="races with the clock")], 1.0).good


def test_a_pattern_that_also_meets_a_passing_test_is_too_wide() -> None:
    assert not judge([GOOD, BAD], [entry("tests/test_a.py::*")], 1.0).good


def test_an_entry_that_meets_no_test_is_stale_only_when_nothing_was_deselected() -> None:
    listed = entry("tests/test_a.py::test_renamed")
    assert judge([GOOD], [listed], 1.0, whole=True).stale == (listed,)
    assert judge([GOOD], [listed], 1.0, whole=False).good


def test_an_entry_whose_test_is_skipped_is_left_alone() -> None:
    assert judge([SKIPPED], [entry(SKIPPED.id)], 1.0).good


@pytest.mark.parametrize(
    ("pattern", "test", "matches"),
    [
        ("a.py::test[x-1]", "a.py::test[x-1]", True),
        ("a.py::test[x-1]", "a.py::testx", False),
        ("a.py::test[*]", "a.py::test[y-2]", True),
        ("a.py::test*", "b.py::test_1", False),
        ("a.py::test", "a.py::test_more", False),
        ("a?py", "a.py", False),
    ],
)
def test_only_the_star_is_special_in_a_pattern(pattern: str, test: str, matches: bool) -> None:
    assert entry(pattern).matches(test) is matches


def test_an_entry_needs_a_reason_and_a_known_target() -> None:
    with pytest.raises(ValueError, match="no reason"):
        parse_expectations('[[failure]]\nsuite = "a"\ntest = "t"\nreason = " "')
    with pytest.raises(ValueError, match="allowed are microvm, stock, any"):
        parse_expectations('[[failure]]\nsuite = "a"\ntest = "t"\nreason = "r"\ntarget = "vm"')
    with pytest.raises(TypeError):
        parse_expectations('[[failure]]\nsuite = "a"\ntest = "t"\nreason = "r"\nwhy = "?"')


def test_the_worst_phase_decides_and_seconds_add_up() -> None:
    lines = [event("collected", count=1), event("start", id="t")]
    lines += [report("t", "setup"), report("t", "call"), report("t", "teardown", "failed", detail="leak")]
    (result,) = read_reports([*lines, event("finish", status=1)])
    assert result == Result("t", "failed", 0.75, "leak")


def test_a_test_that_is_run_again_counts_by_its_last_run() -> None:
    lines = [event("collected", count=1), *whole_test("t", "failed"), *whole_test("t")]
    assert [result.outcome for result in read_reports([*lines, event("finish", status=0)])] == ["passed"]


def test_a_process_that_dies_fails_the_running_test_and_the_suite() -> None:
    lines = [
        event("collected", count=5),
        *whole_test("one"),
        event("start", id="two"),
        report("two", "setup"),
    ]
    results = {result.id: result.outcome for result in read_reports([*lines, '{"event": "rep'])}
    assert results == {"one": "passed", "two": "failed", INCOMPLETE: "failed"}


def test_a_suite_without_any_report_has_failed() -> None:
    (result,) = read_reports([])
    assert (result.id, result.outcome) == (INCOMPLETE, "failed")


def test_no_pattern_excuses_an_incomplete_suite() -> None:
    verdict = judge(read_reports([]), [entry("*")], 1.0)
    assert [result.id for result in verdict.unexpected] == [INCOMPLETE]


def test_a_file_that_cannot_be_collected_is_a_failure() -> None:
    lines = [
        report("tests/test_a.py", "collect", "failed", detail="ImportError"),
        event("collected", count=0),
    ]
    results = read_reports([*lines, event("finish", status=2)])
    assert [(result.id, result.outcome) for result in results] == [("tests/test_a.py", "failed")]
