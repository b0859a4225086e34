"""The search for what a suite leaves, with real processes in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import json, subprocess, sys
from pathlib import Path
from tests.conformance import leftovers

leftovers.GRACE = 0.3
leftovers.become_reaper()
# A shell that ends at once and leaves a process in a session of its own, as a killed supervisor might.
subprocess.run(["/bin/sh", "-c", sys.argv[2] + " &"], start_new_session=True)
found = leftovers.collect(Path(sys.argv[1]))
again = leftovers.collect(Path(sys.argv[1]))
print(json.dumps([found.processes, found.strangers, found.files, found.clean, again.processes +
again.strangers]))
"""


def collect(runtime: Path, command: str) -> list[object]:
    """What `collect` finds after a suite that left `command` running, and what it finds then."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(runtime), command],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
    )
    found: list[object] = json.loads(done.stdout)
    return found


def test_an_orphan_of_ours_is_found_and_ended(tmp_path: Path) -> None:
    command = "exec python3 -c 'import time; time.sleep(60)' sandbox_kernel.supervisor"
    processes, strangers, files, clean, again = collect(tmp_path, command)
    assert str(processes).count("sandbox_kernel.supervisor") == 1
    assert (strangers, files, clean, again) == ([], [], False, [])


def test_a_suites_own_orphan_is_ended_and_is_no_fault_of_ours(tmp_path: Path) -> None:
    processes, strangers, files, clean, again = collect(tmp_path, "exec sleep 60")
    assert str(strangers).count("sleep 60") == 1
    assert (processes, files, clean, again) == ([], [], True, [])


def test_a_file_in_the_runtime_directory_is_found(tmp_path: Path) -> None:
    left = tmp_path / "sandbox-kernel" / "0123456789ab"
    left.mkdir(parents=True)
    processes, _, files, clean, _ = collect(tmp_path, "true")
    assert (processes, files, clean) == ([], [str(left)], False)
