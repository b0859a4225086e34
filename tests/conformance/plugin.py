"""pytest in a suite's process: reports as lines of JSON, and waits that a slow machine can keep.

Run as a program inside the suites' environment: `python -P plugin.py REPORTS PATIENCE PYTEST-ARGUMENTS…`;
it imports nothing of this repository, because the suites must not see it.

Rules for waits:

- Suites carry waits that were chosen on fast machines ("the next message within 1 s"). Without hardware
  virtualisation the guest's processor is about eleven times slower. So each wait of half a second or more
  that a test hands to a blocking client's channel is multiplied by PATIENCE. A shorter one asks whether
  something is there *now* and stays as it is, like every assertion and everything the kernel or a
  provisioner waits for. The same holds for the time that a test gives itself (its `timeout` mark) and a
  server (Tornado's default for a request).
- It holds for each target alike. PATIENCE 1 changes nothing.

Rules for reports: one line per event, flushed. A test that starts and never ends is a failure for the
reader, so a killed process costs nothing that was already known.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = 0.5
"""Seconds; a shorter wait is a question, not patience."""


def lifted(timeout: float | None, patience: float) -> float | None:
    """The wait in seconds that stands for `timeout` on this machine; None is "for ever"."""
    return timeout if timeout is None or timeout < SHORT else timeout * patience


class Conformance:
    """The plugin."""

    def __init__(self, reports: Path, patience: float) -> None:
        self._file = reports.open("a", encoding="utf-8")
        self._patience = patience

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tells how many tests are to come, and lifts the waits.

        Not earlier: some suites set variables that have to stand before Jupyter's first import.
        """
        self._write(event="collected", count=len(session.items))
        if self._patience != 1:
            from jupyter_client import channels  # see above

            patient = self._patient(channels.ZMQSocketChannel.get_msg)
            channels.ZMQSocketChannel.get_msg = patient  # type: ignore[method-assign]
            for item in session.items:
                self._lift_mark(item)
            self._lift_requests()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure of that file."""
        if report.failed:
            self._write(
                event="report",
                id=report.nodeid,
                when="collect",
                outcome="failed",
                seconds=0.0,
                detail=report.longreprtext,
            )

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """Tells which test runs."""
        self._write(event="start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tells how a phase (setup, call, teardown) of a test ended.

        A subtest that is skipped or passes says nothing about its test.
        """
        if isinstance(report, pytest.SubtestReport) and not report.failed:
            return
        self._write(
            event="report",
            id=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            seconds=report.duration,
            detail=_last_lines(report) if report.outcome != "passed" else "",
        )

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Tells that the suite came to its end."""
        self._write(event="finish", status=int(exitstatus))

    def _patient(self, get_msg: Callable[..., Any]) -> Callable[..., Any]:
        patience = self._patience

        @functools.wraps(get_msg)
        def patient(channel: Any, timeout: float | None = None) -> Any:
            return get_msg(channel, timeout=lifted(timeout, patience))

        return patient

    def _lift_mark(self, item: pytest.Item) -> None:
        mark = item.get_closest_marker("timeout")
        if mark is not None and mark.args:
            own = pytest.mark.timeout(
                lifted(float(mark.args[0]), self._patience), *mark.args[1:], **mark.kwargs
            )
            item.add_marker(own, append=False)

    def _lift_requests(self) -> None:
        from tornado.httpclient import HTTPRequest

        for name in ("connect_timeout", "request_timeout"):
            HTTPRequest._DEFAULTS[name] = lifted(HTTPRequest._DEFAULTS[name], self._patience)

    def _write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def _last_lines(report: pytest.TestReport, lines: int = 12) -> str:
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return str(report.longrepr[2])
    return "\n".join(report.longreprtext.splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[3:], plugins=[Conformance(Path(sys.argv[1]), float(sys.argv[2]))]))
