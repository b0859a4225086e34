"""Runs one program for the host: bounded in time and output, never longer than itself.

It ends when the program does, even if a child of it lives on and keeps the pipe open.
"""

from __future__ import annotations

import os
import select
import time

from children import Children, Plan

_SIGKILL = 9
_PIPE = 65536
"""What a pipe holds (pipe(7)): as much can still be in it when the program has ended."""


class Outcome:
    """What a program came to.

    Attributes:
        code: exit status; negative: the signal that killed it.
        output: the first bytes of its standard output and error.
        truncated: whether there was more.
        timed_out: whether it was killed because its time was up.
    """

    def __init__(self, code: int, output: bytes, truncated: bool, timed_out: bool) -> None:
        self.code, self.output, self.truncated, self.timed_out = code, output, truncated, timed_out


class _Output:
    def __init__(self, limit: int) -> None:
        self.kept = bytearray()
        self.truncated = False
        self._limit = limit

    def add(self, data: bytes) -> None:
        room = self._limit - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room


def run(children: Children, plan: Plan, reader: int, seconds: float, limit: int) -> Outcome:
    """Starts `plan` and follows it to its end.

    Args:
        children: where it is started.
        plan: its `stdout` is the pipe's writing end, which is closed here.
        reader: the pipe's reading end, closed here, too.
        seconds: its process group is killed after that.
        limit: bytes of output to keep; the rest is read and dropped.

    Raises:
        OSError: it cannot be executed.
    """
    try:
        try:
            pid = children.start(plan)
        finally:
            os.close(plan.stdout)
        output = _Output(limit)
        ended = _follow(children, pid, reader, time.monotonic() + seconds, output)
        if not ended:
            children.signal(pid, _SIGKILL)
        status = children.wait(pid, None)
        assert status is not None
        return Outcome(os.waitstatus_to_exitcode(status), bytes(output.kept), output.truncated, not ended)
    finally:
        os.close(reader)


def _follow(children: Children, pid: int, reader: int, deadline: float, output: _Output) -> bool:
    """Reads until the program has ended (True) or the deadline has passed (False)."""
    watch = children.watch(pid)
    try:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if watch is not None:
            poll.register(watch, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            ready = {} if left <= 0 else dict(poll.poll(left * 1000))
            if watch is None or watch in ready:
                os.set_blocking(reader, False)
                _last(reader, output)
                return True
            if not ready:
                return False
            data = os.read(reader, _PIPE)
            output.add(data)
            if not data:
                poll.unregister(reader)
    finally:
        if watch is not None:
            os.close(watch)


def _last(reader: int, output: _Output) -> None:
    """What is in the pipe when the program has ended; what others go on writing is not its output."""
    try:
        output.add(os.read(reader, _PIPE))
    except BlockingIOError:
        pass
