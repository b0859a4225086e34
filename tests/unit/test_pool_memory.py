"""Memory, as /proc tells it."""

from __future__ import annotations

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
