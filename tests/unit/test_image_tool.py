"""Running system tools: their failures become sentences, and they end with whoever runs them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.errors import ImageError, MissingToolError, NoSpaceError
from sandbox_kernel.image import tool

DEADLINE = 30.0


def gone(pid: int) -> bool:
    """Whether the process ends before the deadline; a zombie nobody reaps counts as ended."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            psutil.Process(pid).wait(0.05)
            return True
        except psutil.NoSuchProcess:
            return True
        except psutil.TimeoutExpired:
            continue
    return False


def test_output_comes_back_and_input_goes_in() -> None:
    assert tool.run(["cat"], purpose="Copying", stdin=b"x" * 300_000) == b"x" * 300_000
    assert tool.run(["cat"], purpose="Copying") == b""


def test_a_missing_tool_is_named_with_the_fix() -> None:
    with pytest.raises(
        MissingToolError, match=r"^no-such-tool is not installed; run `sandbox-kernel setup`\.$"
    ):
        tool.run(["no-such-tool"], purpose="Trying")


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("note\nE: Unable to locate package x\n", "Trying failed: E: Unable to locate package x"),
        (
            "noise\n  × No solution found\n  ╰─▶ Because x\n",
            "Trying failed: × No solution found ╰─▶ Because x",
        ),
        ("just words\n", "Trying failed: just words"),
        ("", "Trying failed: exit status 3"),
    ],
)
def test_a_failure_ends_with_the_tools_own_words(complaint: str, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        tool.run(["sh", "-c", 'printf %s "$1" >&2; exit 3', "sh", complaint], purpose="Trying")
    assert str(caught.value) == said


def test_allowed_exit_codes_are_no_failure() -> None:
    tool.run(["sh", "-c", "exit 1"], purpose="Trying", allowed=(0, 1))


def test_a_full_disk_is_told_apart_and_its_file_system_named(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo 'cp: error: No space left on device' >&2; exit 1"]
    with (
        pytest.raises(NoSpaceError, match=f"file system {tool.mount_point(tmp_path)} has .* free some space"),
        tool.disk_errors(tmp_path),
    ):
        tool.run(command, purpose="Trying")
    with (
        pytest.raises(NoSpaceError, match=f"file system {tool.mount_point(tmp_path)}"),
        tool.disk_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_really_full_disk_is_one_sentence() -> None:
    with (
        pytest.raises(NoSpaceError),
        tool.disk_errors(Path("/")),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_other_errors_of_the_operating_system_are_one_sentence_too(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing/file: No such file"), tool.disk_errors(tmp_path):
        (tmp_path / "missing/file").write_text("x")


def test_too_little_space_is_refused_before_the_work(tmp_path: Path) -> None:
    tool.require_space(tmp_path / "not/yet/there", 1, "Building")
    with pytest.raises(NoSpaceError, match=r"^Building needs 1000000000\.0 GB and the file system / has"):
        tool.require_space(Path("/"), 10**18, "Building")


def test_an_interrupted_tool_and_its_children_end_before_the_exception_goes_on(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    program = (
        "import signal, sys; from sandbox_kernel.image import tool\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        'script = \'trap "" TERM; sleep 1000 & echo $! $$ > "$1"; wait\'\n'
        "tool.run(['sh', '-c', script, 'sh', sys.argv[1]], purpose='x')"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(pids)]) as caller:
        children = [int(word) for word in pids.read_text().split()]
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(DEADLINE) == 7
        assert len(children) == 2
        assert all(gone(pid) for pid in children)


def test_a_tool_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    program = (
        "import sys; from sandbox_kernel.image import tool\n"
        "tool.run(['sh', '-c', 'sleep 1000 & echo $! $$ > \"$1\"; wait', 'sh', sys.argv[1]], purpose='x')"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(pids)]) as caller:
        children = [int(word) for word in pids.read_text().split()]
        caller.kill()
        assert len(children) == 2
        assert all(gone(pid) for pid in children)
