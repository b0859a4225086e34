"""How long a start took."""

from __future__ import annotations

import time

from sandbox_kernel.trace import Trace, lines, summary


def test_phases_count_from_the_beginning_in_order() -> None:
    trace = Trace(time.monotonic() - 2.0)
    trace.mark("one")
    trace.mark("two")
    assert list(trace.phases) == ["one", "two"]
    assert 2.0 <= trace.phases["one"] <= trace.phases["two"] < 3.0


def test_a_phase_that_comes_again_counts_from_its_last_time() -> None:
    trace = Trace()
    trace.mark("one")
    trace.mark("two")
    trace.mark("one")
    assert list(trace.phases) == ["two", "one"]


def test_a_trace_begins_anew_for_the_kernel_of_a_vm_that_waited() -> None:
    trace = Trace(time.monotonic() - 100.0)
    trace.mark("one")
    trace.restart(time.monotonic())
    trace.mark("two")
    assert list(trace.phases) == ["two"]
    assert trace.phases["two"] < 1.0


def test_a_summary_is_one_line() -> None:
    assert summary({"one": 0.1234, "two": 2.0}) == "one 0.123 s · two 2.000 s"


def test_phases_one_a_line_with_what_passed_since_the_one_before() -> None:
    assert [line.split() for line in lines({"decided": 0.0125, "QEMU started": 0.0725})] == [
        ["0.0125", "s", "+0.0125", "s", "decided"],
        ["0.0725", "s", "+0.0600", "s", "QEMU", "started"],
    ]
    assert lines({}) == []
