"""Memory, as /proc tells it."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_kernel.pool import memory
from sandbox_kernel.pool.policy import Host


def test_the_machines_memory_and_its_pressure(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    assert memory.look(tmp_path) == Host(2.0, 1.0, 0.0)
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text(
        "some avg10=3.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=1\n"
    )
    assert memory.look(tmp_path).pressure == 3.25


def process(proc: Path, pid: int, private: int, children: str = "") -> None:
    (proc / str(pid) / "task" / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "smaps_rollup").write_text(
        f"00-ff ---p 0 0:0 0 [rollup]\nRss: 9999 kB\nPrivate_Clean: {private} kB\nPrivate_Dirty: 1024 kB\n"
    )
    (proc / str(pid) / "task" / str(pid) / "children").write_text(children)


def test_a_process_counts_with_all_below_it(tmp_path: Path) -> None:
    process(tmp_path, 1, 1024, "2 3")
    process(tmp_path, 2, 0)
    process(tmp_path, 3, 0, "4 ")
    assert memory.of(1, tmp_path) == 4.0  # 4 has gone meanwhile


def test_this_process_has_some() -> None:
    assert 1.0 < memory.of(os.getpid()) < 10000.0
    assert memory.of(2**22 + 1) == 0.0
