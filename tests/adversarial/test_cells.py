"""Every attack of a cell: it ends as its case says, is told, and a neighbour hardly notices."""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.adversarial.case import Case, Outcome
from tests.adversarial.cases import CASES
from tests.adversarial.conftest import Neighbourhood
from tests.microvm import READY, Kernel, microvm

SLACK = 2.0
"""Times the quiet p99 that the neighbour's may be meanwhile."""
INTERRUPTED = 2.0
"""Seconds in which an interrupt has to take effect, under software emulation."""
STARTS = {"restored": "auto", "cold": "cold"}


class Cell:
    """A cell that runs, and what comes of it; of a flood only the end is kept."""

    def __init__(self, kernel: Kernel, case: Case) -> None:
        self._kernel = kernel
        self.began = time.monotonic()
        self.id: str = kernel.client.execute(case.cell, allow_stdin=case.stdin)
        self.text = ""
        self.errors: list[dict[str, Any]] = []
        self.ended = 0.0

    def follow(self, until: float) -> bool:
        """Takes what comes until the cell has ended or the time is `until`; whether it has ended."""
        while not self.ended and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                message = self._kernel.client.get_iopub_msg(timeout=0.1)
                if message["parent_header"].get("msg_id") == self.id:
                    self._take(message)
        return bool(self.ended)

    def _take(self, message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            self.text = (self.text + content["text"])[-5000:]
        elif message["msg_type"] == "error":
            self.errors.append(message)
        elif content.get("execution_state") == "idle":
            self.ended = time.monotonic()


def by_interrupt(kernel: Kernel, cell: Cell, case: Case) -> tuple[str, float]:
    assert not cell.follow(cell.began + case.lasts), cell.errors
    asked = time.monotonic()
    kernel.manager.interrupt_kernel()
    assert cell.follow(asked + READY)
    assert [error["content"]["ename"] for error in cell.errors] == [case.seen]
    assert cell.ended - asked < INTERRUPTED
    return case.seen, cell.ended - asked


def by_error(kernel: Kernel, cell: Cell, case: Case) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    [error] = cell.errors
    text = f"{error['content']['ename']}: {error['content']['evalue']}"
    assert re.search(case.seen, text), text
    return text.split("\n")[0], cell.ended - cell.began


def by_output(kernel: Kernel, cell: Cell, case: Case) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    assert cell.errors == []
    found = re.search(f"({case.seen}[^\n]*)", cell.text)
    assert found, cell.text
    return found.group(1), cell.ended - cell.began


def by_death(kernel: Kernel, cell: Cell, case: Case) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    [error] = cell.errors
    assert error["content"]["ename"] == case.seen
    assert error["metadata"]["sandbox_kernel"]["name"] == case.seen
    return f"{case.seen}: {error['content']['evalue']}", cell.ended - cell.began


ENDS: dict[str, Callable[[Kernel, Cell, Case], tuple[str, float]]] = {
    "interrupt": by_interrupt,
    "error": by_error,
    "output": by_output,
    "death": by_death,
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_attack_ends_as_it_should(
    case: Case, start: str, neighbourhood: Neighbourhood, record: Callable[[Outcome], None]
) -> None:
    with microvm(start=STARTS[start], **case.config) as kernel:
        kernel.run("'warm'")
        quiet = neighbourhood.quiet()
        cell = Cell(kernel, case)
        seen, control = ENDS[case.ends](kernel, cell, case)
        meanwhile = neighbourhood.meanwhile()
        record(Outcome(case, start, seen, control, quiet, meanwhile))
        if case.ends != "death":
            kernel.reply_to(cell.id)
            assert kernel.run("1 + 1") == "2"
            kernel.manager.restart_kernel(now=True)
            kernel.client.wait_for_ready(timeout=READY)
            assert kernel.run("1 + 1") == "2"
        assert meanwhile < SLACK * quiet
