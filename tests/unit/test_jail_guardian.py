"""The guardian cleans up whatever way its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

OWNER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from sandbox_kernel.jail.guardian import Guardian

    runtime, logs, verdict = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    guardian = Guardian(runtime, logs, [], hold=(int(sys.argv[4]),))
    if verdict == "keep":
        guardian.keep_logs()
    if verdict == "moved":
        guardian.also(runtime.with_name("moved to"))
        runtime.rename(runtime.with_name("moved to"))
    if verdict == "sockets":
        import socket
        for name in ("left", "closed", "another's", "-odd  name\\\\n"):
            with socket.socket(socket.AF_UNIX) as made:
                path = runtime.with_name(name)
                made.bind(str(path))
            status = path.lstat()
            guardian.guard(f"{status.st_dev}:{status.st_ino} {path}")
            if name == "closed":
                guardian.release(f"{status.st_dev}:{status.st_ino} {path}")
            if name == "another's":
                path.rename(runtime.with_name("elsewhere"))
                path.write_text("mine")
    print(guardian.pid, flush=True)
    sys.stdin.read()
    """
)


def run_owner(tmp_path: Path, verdict: str, end: str) -> tuple[Path, Path]:
    """Starts an owner, ends it, and returns its folders once the guardian has let go of what it holds."""
    runtime, logs = tmp_path / "runtime", tmp_path / "logs"
    for folder in (runtime, logs):
        folder.mkdir()
        (folder / "file").touch()
    held, holder = os.pipe()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(runtime), str(logs), verdict, str(holder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(holder,),
    )
    os.close(holder)
    assert owner.stdout is not None
    assert owner.stdin is not None
    owner.stdout.readline()
    if end == "kill":
        os.kill(owner.pid, signal.SIGKILL)
    owner.stdin.close()
    owner.wait()
    owner.stdout.close()
    assert os.read(held, 1) == b""
    os.close(held)
    return runtime, logs


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_nothing_is_left_of_an_owner_that_ended(tmp_path: Path, end: str) -> None:
    runtime, logs = run_owner(tmp_path, "remove", end)
    assert not runtime.exists()
    assert not logs.exists()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_logs_that_an_error_names_are_kept(tmp_path: Path, end: str) -> None:
    runtime, logs = run_owner(tmp_path, "keep", end)
    assert not runtime.exists()
    assert (logs / "file").exists()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_folder_that_was_moved_is_removed_where_it_is(tmp_path: Path, end: str) -> None:
    runtime, logs = run_owner(tmp_path, "moved", end)
    assert list(tmp_path.iterdir()) == []
    assert not runtime.exists()
    assert not logs.exists()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_socket_that_lies_elsewhere_is_removed_unless_it_is_somebody_elses(
    tmp_path: Path, end: str
) -> None:
    run_owner(tmp_path, "sockets", end)
    assert {path.name for path in tmp_path.iterdir()} == {"closed", "another's", "elsewhere"}
