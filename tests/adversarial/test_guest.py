"""A guest whose Linux or agent has been taken over: its VM dies alone and says why, or goes on."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_kernel.errors import GuestError
from tests.adversarial import driver, image
from tests.adversarial.case import Case, Outcome
from tests.adversarial.conftest import Neighbourhood
from tests.adversarial.test_cells import SLACK, Cell, by_death, restart
from tests.adversarial.victim import STARTS, victim
from tests.microvm import READY, Kernel, until

DRIVER = Path(driver.__file__).read_text()


@pytest.fixture(scope="session")
def adversary(installed: None) -> str:
    return image.ensure()


def as_root(script: str, afterwards: str = "import time\ntime.sleep(60)") -> str:
    """A cell that has `script` run as root, and goes on."""
    return (
        f"with open('/tmp/draft', 'w') as file: file.write({script!r})\n"
        "import os\nos.rename('/tmp/draft', '/tmp/root.py')\n" + afterwards
    )


ROOTS = [
    Case(
        "panic",
        "the VM",
        as_root("open('/proc/sysrq-trigger', 'w').write('c')"),
        "death",
        "GuestPanicked",
    ),
    Case(
        "PID 1 overwritten",
        "the VM",
        as_root(
            "import os\nmaps = open('/proc/1/maps').read().splitlines()\n"
            "memory = os.open('/proc/1/mem', os.O_WRONLY)\n"
            "for line in maps:\n"
            "    first, last = (int(end, 16) for end in line.split()[0].split('-'))\n"
            "    if 'libc.so' in line and ' r-xp ' in line: os.pwrite(memory, bytes(last - first), first)"
        ),
        "death",
        "GuestPanicked",
    ),
    Case(
        "reboot as root",
        "the VM",
        as_root("import ctypes\nctypes.CDLL(None).reboot(0x1234567)"),
        "death",
        "GuestPoweredOff",
    ),
    Case(
        "sysrq as root",
        "the VM",
        as_root("open('/proc/sysrq-trigger', 'w').write('b')"),
        "death",
        "GuestPoweredOff",
    ),
    Case(
        "power off as root",
        "cell_timeout = 4",
        as_root("import ctypes\nctypes.CDLL(None).reboot(0x4321fedc)"),
        "death",
        "CellTimeLimitExceeded|GuestPoweredOff",
        {"cell_timeout": 4, "cell_grace": 1},
    ),
    Case(
        "the clock set back as root",
        "cell_timeout = 3",
        as_root("import time\ntime.clock_settime(time.CLOCK_REALTIME, 1)", "sum(range(10**15))"),
        "death",
        "CellTimeLimitExceeded",
        {"cell_timeout": 3, "cell_grace": 1},
    ),
    Case(
        "SIGKILL of everything as root",
        "the VM",
        as_root("import os\nos.kill(-1, 9)"),
        "death",
        "KernelExited",
    ),
]

DEVICE = [
    Case(
        name,
        "vsock device",
        f"driver = {DRIVER!r}\nopen('/tmp/driver.py', 'w').write(driver)\n"
        + as_root(f"import subprocess\nsubprocess.run(['python3', '/tmp/driver.py', {name!r}])"),
        "death",
        "GuestProtocolError|GuestError|VMMDied",
    )
    for name in re.findall(r'name == "(.*)"', DRIVER)
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", [*ROOTS, *DEVICE], ids=lambda case: case.name)
def test_a_guest_that_was_taken_over_dies_alone(
    case: Case,
    start: str,
    adversary: str,
    neighbourhood: Neighbourhood,
    record: Callable[[Outcome], None],
) -> None:
    with victim(case, start, adversary) as kernel:
        quiet = neighbourhood.quiet()
        seen, control = by_death(kernel, Cell(kernel, case), case, neighbourhood.patience)
        meanwhile = neighbourhood.meanwhile()
        record(Outcome(case, start, seen, control, quiet, meanwhile))
        assert until(lambda: not kernel.manager.is_alive(), READY)
        restart(kernel, start)
        assert meanwhile < SLACK * quiet


LIES = re.findall(r'^        "(.*?)":', image.LIES, re.MULTILINE)
HARMLESS = {
    "a refusal with a terminal's commands": 2,
    "silence": 2,
    "half an answer": 2,
    # The second one is taken for the next call's: of the same kind, from the same liar.
    "two answers": 0,
}
"""Lies within the protocol, and how many of two interrupts fail over them."""


def lying(lie: str) -> Case:
    """A cell after which the agent lies, and which no interrupt ends."""
    return Case(
        f"an agent's lie: {lie}",
        "agent's protocol",
        f"open('/tmp/lie', 'w').write({lie!r})\nimport time\nwhile True:\n"
        "    try: time.sleep(600)\n    except KeyboardInterrupt: pass",
        "death",
        "GuestProtocolError",
    )


def harmless(kernel: Kernel, lie: str, errors: list[str]) -> str:
    """What is seen of a lie within the protocol: a call that fails, and a kernel that goes on."""
    assert len(errors) == HARMLESS[lie]
    assert all(error.isprintable() for error in errors)
    assert kernel.manager.is_alive()
    return errors[0] if errors else "nothing"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("lie", LIES)
def test_an_agent_that_lies_costs_its_vm_or_nothing(
    lie: str, start: str, adversary: str, neighbourhood: Neighbourhood, record: Callable[[Outcome], None]
) -> None:
    case = lying(lie)
    with victim(case, start, adversary) as kernel:
        quiet = neighbourhood.quiet()
        cell = Cell(kernel, case)
        assert not cell.follow(cell.began + 1)
        errors = []
        asked = time.monotonic()
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # no kernel any more
                try:
                    kernel.manager.interrupt_kernel()
                except GuestError as error:
                    errors.append(str(error))
        if lie in HARMLESS:
            seen, ended = harmless(kernel, lie, errors), time.monotonic()
        else:
            seen, _ = by_death(kernel, cell, case, neighbourhood.patience)
            ended = cell.ended
        meanwhile = neighbourhood.meanwhile()
        record(Outcome(case, start, seen, ended - asked, quiet, meanwhile))
        restart(kernel, start)
        assert meanwhile < SLACK * quiet
