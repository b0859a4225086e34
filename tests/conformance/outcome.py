"""What a suite's reports mean, held against the list of expected failures. Pure.

Rules:

- A test's outcome is that of its worst phase in its last run (a plugin may run a test again): failed before
  skipped before passed. A test that starts and has no end has failed, and so have the tests that were
  collected and never started.
- A failure is expected when an entry of the list matches it; otherwise it fails the run.
- An entry whose test passes is stale and fails the run, too; so is one that matches no test of a suite that
  ran whole. An entry marked flaky says why its test passes only sometimes; it is never stale.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

INCOMPLETE = "(the suite itself)"
"""Stands where a test's id would, for a suite that did not come to its end."""
_RANK = {"passed": 0, "skipped": 1, "failed": 2}


@dataclass(frozen=True)
class Result:
    """One test.

    Attributes:
        id: pytest's node id.
        outcome: `passed`, `failed` or `skipped`.
        seconds: of all its phases.
        detail: why it failed or was skipped.
    """

    id: str
    outcome: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Expectation:
    """A failure that is expected.

    Attributes:
        suite: where the test is.
        test: its node id, in which `*` stands for anything.
        reason: why it may fail.
        target: `microvm`, `stock` or `any`.
        flaky: why it passes sometimes; empty when it never does.
    """

    suite: str
    test: str
    reason: str
    target: str = "microvm"
    flaky: str = ""

    def matches(self, test: str) -> bool:
        """Whether `test` is the one, or one of those, that this entry means."""
        return self._pattern.fullmatch(test) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(".*".join(map(re.escape, self.test.split("*"))), re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """A suite's results, sorted.

    Attributes:
        passed: tests.
        skipped: tests.
        expected: failures that the list explains.
        unexpected: failures that it does not.
        stale: entries that are not true any more.
        seconds: that the suite took.
    """

    passed: int
    skipped: int
    expected: tuple[Result, ...]
    unexpected: tuple[Result, ...]
    stale: tuple[Expectation, ...]
    seconds: float

    @property
    def failed(self) -> int:
        """Failures, expected or not."""
        return len(self.expected) + len(self.unexpected)

    @property
    def good(self) -> bool:
        """Whether this suite lets the run succeed."""
        return not self.unexpected and not self.stale


def parse_expectations(text: str) -> tuple[Expectation, ...]:
    """The entries of an `expected_failures.toml`.

    Raises:
        TypeError: a key is unknown or missing.
        ValueError: an entry without a reason, or for an unknown target.
    """
    entries = tuple(Expectation(**entry) for entry in tomllib.loads(text).get("failure", []))
    for entry in entries:
        if not entry.reason.strip():
            raise ValueError(f"The expected failure {entry.test} has no reason; write one.")
        if entry.target not in ("microvm", "stock", "any"):
            raise ValueError(
                f"The expected failure {entry.test} is for {entry.target!r}; allowed are microvm, stock, any."
            )
    return entries


def read_reports(lines: Iterable[str]) -> tuple[Result, ...]:
    """The results that the plugin's lines of JSON tell.

    Args:
        lines: what the plugin wrote, in order; a last line cut short by a killed process is ignored.
    """
    results: dict[str, Result] = {}
    running: str | None = None
    collected, finished = 0, False
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        match event["event"]:
            case "collected":
                collected = int(event["count"])
            case "start":
                running = event["id"]
            case "report":
                old = results.get(event["id"])
                again = event["when"] in ("setup", "collect") or old is None
                results[event["id"]] = _worse(None if again else old, event)
                if event["when"] == "teardown":
                    running = None
            case "finish":
                finished = True
    if running is not None:
        seconds = results[running].seconds if running in results else 0.0
        results[running] = Result(running, "failed", seconds, "The test process ended during this test.")
    if not finished or len(results) < collected:
        detail = f"{len(results)} of {collected} tests have a result; see the suite's log."
        results[INCOMPLETE] = Result(INCOMPLETE, "failed", 0.0, detail)
    return tuple(results.values())


def judge(
    results: Sequence[Result], expectations: Iterable[Expectation], seconds: float, whole: bool = True
) -> Verdict:
    """Sorts a suite's results.

    Args:
        results: of one suite.
        expectations: those of this suite and target.
        seconds: that it took.
        whole: nothing was deselected, so an entry that matches no test is stale.
    """
    entries = tuple(expectations)
    failures = [result for result in results if result.outcome == "failed"]
    expected = tuple(
        result
        for result in failures
        if result.id != INCOMPLETE and any(entry.matches(result.id) for entry in entries)
    )
    return Verdict(
        passed=sum(result.outcome == "passed" for result in results),
        skipped=sum(result.outcome == "skipped" for result in results),
        expected=expected,
        unexpected=tuple(result for result in failures if result not in expected),
        stale=tuple(entry for entry in entries if _is_stale(entry, results, whole)),
        seconds=seconds,
    )


def _is_stale(entry: Expectation, results: Sequence[Result], whole: bool) -> bool:
    met = [result.outcome for result in results if entry.matches(result.id)]
    if not met:
        return whole
    return "passed" in met and not entry.flaky


def _worse(old: Result | None, event: dict[str, object]) -> Result:
    new = Result(
        str(event["id"]), str(event["outcome"]), float(str(event["seconds"])), str(event.get("detail", ""))
    )
    if old is None:
        return new
    worst = new if _RANK[new.outcome] > _RANK[old.outcome] else old
    return Result(worst.id, worst.outcome, old.seconds + new.seconds, worst.detail)
