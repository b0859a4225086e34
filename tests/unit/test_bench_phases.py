"""Medians of phases, and which variant of a kernel a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import phases
from bench.kernel import COLD, POOLED, KernelTrouble, expect, variant
from bench.phases import Phase

TURNS = [
    {"decided": 0.25, "QEMU started": 0.5, "kernel connected": 1.0},
    {"decided": 0.125, "QEMU started": 0.375, "clock set": 0.75, "kernel connected": 2.0},
    {"decided": 0.5, "QEMU started": 0.625, "kernel connected": 3.0},
]


def test_a_phase_is_the_median_of_its_turns_and_what_passed_since_the_one_before() -> None:
    assert phases.summarise(TURNS) == [
        Phase("decided", 0.25, 0.25, 3),
        Phase("QEMU started", 0.5, 0.25, 3),
        Phase("clock set", 0.75, 0.25, 1),
        Phase("kernel connected", 2.0, 1.25, 3),
    ]
    assert phases.summarise([]) == []


def test_the_table_has_a_row_per_phase_in_milliseconds() -> None:
    table = phases.table("python3-microvm", phases.summarise(TURNS))
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["decided", "QEMU started", "clock set", "kernel connected"]
    assert columns[1] == ["250.0", "500.0", "750.0", "2000.0"]
    assert columns[2] == ["250.0", "250.0", "250.0", "1250.0"]
    assert columns[3] == ["3", "3", "1", "3"]


def test_the_document_has_the_phases_of_each_kernel() -> None:
    found = phases.document({"python3-microvm": phases.summarise(TURNS[:1])})
    assert found["python3-microvm"][0] == {"name": "decided", "at": 0.25, "since": 0.25, "turns": 1}


def test_a_name_says_how_its_vm_starts() -> None:
    assert variant("python3-microvm") == ("python3-microvm", "restored")
    assert variant(f"python3-microvm{COLD}") == ("python3-microvm", "cold")
    assert variant(f"python3-microvm{POOLED}") == ("python3-microvm", "pooled")


@pytest.mark.parametrize(("told", "way"), [("restored", "pooled"), ("cold", "restored"), ("pooled", "cold")])
def test_a_vm_that_started_in_another_way_is_no_measurement(told: str, way: str) -> None:
    with pytest.raises(KernelTrouble, match=f"{told} instead of {way} "):
        expect({"start": told}, way)
    expect({"start": way}, way)
    expect({}, way)  # a kernel without a VM


def test_the_vms_log_says_why_it_started_in_another_way(tmp_path: Path) -> None:
    (tmp_path / "supervisor.log").write_text("10:00 INFO a: b\n10:01 WARNING c: It is damaged.\n")
    with pytest.raises(KernelTrouble, match=r"cold instead of restored \(c: It is damaged\.\)"):
        expect({"start": "cold", "logs": str(tmp_path)}, "restored")
