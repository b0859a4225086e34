"""How the phases of a start are told."""

from __future__ import annotations

from sandbox_kernel.trace import Trace, lines, summary

PHASES = {"decided": 0.0125, "QEMU started": 0.0725}


def test_phases_on_one_line() -> None:
    assert summary({"decided": 0.012, "QEMU started": 0.0731}) == "decided 0.012 s · QEMU started 0.073 s"
    assert summary({}) == ""


def test_phases_one_a_line_with_what_passed_since_the_one_before() -> None:
    assert [line.split() for line in lines(PHASES)] == [
        ["0.0125", "s", "+0.0125", "s", "decided"],
        ["0.0725", "s", "+0.0600", "s", "QEMU", "started"],
    ]
    assert lines({}) == []


def test_a_phase_that_comes_again_counts_from_its_last_time() -> None:
    trace = Trace()
    for phase in ("decided", "QEMU started", "decided"):
        trace.mark(phase)
    assert list(trace.phases) == ["QEMU started", "decided"]
