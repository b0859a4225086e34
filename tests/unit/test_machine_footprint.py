"""What a VM's processes take, as /proc tells it."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_kernel.machine import footprint


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
    assert footprint.of_tree(1, tmp_path) == 4.0  # 4 has gone meanwhile


def test_this_process_has_some() -> None:
    assert 1.0 < footprint.of_tree(os.getpid()) < 10000.0
    assert footprint.of_tree(2**22 + 1) == 0.0


def test_a_process_has_a_cpu_time_and_a_peak() -> None:
    found = footprint.of_process(os.getpid())
    assert found.cpu > 0
    assert found.memory > 1 << 20
    assert found.peak > 1 << 20


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    assert footprint.of_process(2**22 + 1) == footprint.Footprint(0, 0, 0)
