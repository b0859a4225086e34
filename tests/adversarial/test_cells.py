"""Every attack of a cell: it ends as its case says, is told, and a neighbour hardly notices."""

from __future__ import annotations

import contextlib
import queue
import re
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.adversarial.case import Case, Outcome
from tests.adversarial.cases import CASES
from tests.adversarial.conftest import Neighbourhood
from tests.adversarial.victim import STARTS, victim
from tests.microvm import READY, Kernel

SLACK = 2.0
"""Times the quiet p99 that the neighbour's may be meanwhile."""
INTERRUPTED = 2.0
"""Seconds in which an interrupt has to take effect, under software emulation."""
TOLD_BOOTED = 15.0
"""Seconds until the cell has ended, with its traceback, the first one of a kernel that was booted."""


class Cell:
    """A cell that runs, and what comes of it; of a flood only the end is kept."""

    def __init__(self, kernel: Kernel, case: Case) -> None:
        self._kernel = kernel
        code = watched(case.cell) if case.ends == "interrupt" else case.cell
        self.began = time.monotonic()
        self.id: str = kernel.client.execute(code, allow_stdin=case.stdin)
        self.text = ""
        self.errors: list[dict[str, Any]] = []
        self.ended = 0.0

    def follow(self, until: float) -> bool:
        """Takes what comes until the cell has ended or the time is `until`; whether it has ended."""
        while not self.ended and time.monotonic() < until:
            # A message under a wrong key is none for a client.
            with contextlib.suppress(queue.Empty, ValueError):
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


def watched(code: str) -> str:
    """The code, noting when an interrupt has stopped it."""
    return (
        "import time as watch\ntry:\n"
        + textwrap.indent(code, "    ")
        + "\nexcept KeyboardInterrupt:\n    stopped = watch.time()\n    raise"
    )


def by_interrupt(kernel: Kernel, cell: Cell, case: Case, patience: float) -> tuple[str, float]:
    assert not cell.follow(cell.began + case.lasts), cell.errors
    asked, date = time.monotonic(), time.time()
    kernel.manager.interrupt_kernel()
    assert cell.follow(asked + READY)
    assert [error["content"]["ename"] for error in cell.errors] == [case.seen]
    kernel.reply_to(cell.id)
    assert float(kernel.run("stopped")) - date < INTERRUPTED * patience
    booted = kernel.manager.provisioner.report["start"] == "cold"
    assert cell.ended - asked < (TOLD_BOOTED if booted else INTERRUPTED) * patience
    return case.seen, cell.ended - asked


def by_error(kernel: Kernel, cell: Cell, case: Case, patience: float) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    kernel.reply_to(cell.id)
    [error] = cell.errors
    text = f"{error['content']['ename']}: {error['content']['evalue']}"
    assert re.search(case.seen, text), text
    return text.split("\n")[0], cell.ended - cell.began


def by_output(kernel: Kernel, cell: Cell, case: Case, patience: float) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    kernel.reply_to(cell.id)
    assert cell.errors == []
    found = re.search(f"({case.seen}[^\n]*)", cell.text)
    assert found, cell.text
    return found.group(1), cell.ended - cell.began


def by_death(kernel: Kernel, cell: Cell, case: Case, patience: float) -> tuple[str, float]:
    assert cell.follow(cell.began + READY), cell.text
    [error] = cell.errors
    name = error["content"]["ename"]
    assert re.fullmatch(case.seen, name), error["content"]
    assert error["metadata"]["sandbox_kernel"]["name"] == name
    return f"{name}: {error['content']['evalue']}", cell.ended - cell.began


def restart(kernel: Kernel, start: str) -> None:
    """It can be; where kernels boot, which takes long, that is left to the deaths' own tests."""
    if start == "restored":
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=READY)
        assert kernel.run("1 + 1").endswith("2")


ENDS: dict[str, Callable[[Kernel, Cell, Case, float], tuple[str, float]]] = {
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
    with victim(case, start) as kernel:
        quiet = neighbourhood.quiet()
        cell = Cell(kernel, case)
        seen, control = ENDS[case.ends](kernel, cell, case, neighbourhood.patience)
        meanwhile = neighbourhood.meanwhile()
        record(Outcome(case, start, seen, control, quiet, meanwhile))
        if case.ends != "death":
            assert kernel.run("1 + 1").endswith("2")
            restart(kernel, start)
        assert meanwhile < SLACK * quiet
