"""A supervisor that somebody else has started, held by a pidfd and a socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sandbox_kernel.errors import GuestError
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.lifeline import LOST, Ward

SCRIPT = """
import socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
for line in control.makefile():
    if '"signal"' in line:
        control.sendall(b'{"ok": true, "alive": true}\\n')
    else:
        break
control.sendall(sys.argv[2].encode())
"""


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []
    yield made
    for each in made:
        each.kill()
        each.wait()


def handle_of(process: list[subprocess.Popen[bytes]], last_words: str) -> SupervisorHandle:
    ours, theirs = socket.socketpair()
    with theirs:
        started = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(theirs.fileno()), last_words], pass_fds=(theirs.fileno(),)
        )
    process.append(started)
    return SupervisorHandle(Ward(started.pid, os.pidfd_open(started.pid)), ours)


def test_its_last_line_tells_the_status(process: list[subprocess.Popen[bytes]]) -> None:
    handle = handle_of(process, '{"ended": 3}\n')
    assert handle.poll() is None
    assert handle.signal(0)
    handle.stop()
    assert handle.wait() == 3
    assert handle.poll() == 3


def test_a_signal_that_meets_the_last_line_finds_nobody(process: list[subprocess.Popen[bytes]]) -> None:
    handle = handle_of(process, '{"ended": 0}\n')
    handle.stop()
    process[0].wait()
    assert handle.signal(2) is False
    assert handle.wait() == 0


def test_one_that_was_killed_told_nothing(process: list[subprocess.Popen[bytes]]) -> None:
    handle = handle_of(process, "")
    handle.kill()
    assert handle.wait() == LOST
    assert LOST == 128 + signal.SIGKILL


@pytest.mark.parametrize("words", ["no json\n", '{"ended": "x"}\n', '{"ended": 999}\n', "[1]\n"])
def test_nonsense_at_the_end_is_no_status(process: list[subprocess.Popen[bytes]], words: str) -> None:
    handle = handle_of(process, words)
    handle.stop()
    assert handle.wait() == LOST


def test_one_that_ends_while_it_is_asked_is_said_to_have_ended(
    process: list[subprocess.Popen[bytes]],
) -> None:
    handle = handle_of(process, "")
    with pytest.raises(GuestError, match=r"supervisor \(process \d+\) has ended; restart the kernel"):
        handle.status()
    handle.wait()
