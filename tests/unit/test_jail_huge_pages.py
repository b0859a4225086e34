"""Huge pages are refused for a process and for what it executes."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import subprocess
from sandbox_kernel.jail import huge_pages
huge_pages.do_without()
print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout)
"""


def test_a_program_that_is_executed_gets_no_huge_pages() -> None:
    def enabled(status: str) -> str:
        return next(line.split()[1] for line in status.splitlines() if line.startswith("THP_enabled:"))

    plain = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True)
    without = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert (enabled(plain.stdout), enabled(without.stdout)) == ("1", "0")
