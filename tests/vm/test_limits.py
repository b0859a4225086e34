"""Limits of time and output on a kernel in a VM: what holds, and what a person is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.jail import cgroup
from tests.microvm import READY, Kernel, microvm, until


def told(messages: list[dict[str, Any]]) -> list[str]:
    """What is not the kernel's own in a cell's output."""
    texts = [m["content"]["text"] for m in messages if m["msg_type"] == "stream"]
    return [text for text in texts if text.startswith("[sandbox-kernel] ")]


def errors(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in messages if m["msg_type"] == "error"]


@pytest.fixture(scope="module")
def hasty(installed: None) -> Iterator[Kernel]:
    with microvm(cell_timeout=1.5, cell_grace=2) as kernel:
        yield kernel


def test_a_late_cell_is_interrupted_with_a_word_and_state_survives(hasty: Kernel) -> None:
    hasty.run("x = 41")
    cell = hasty.client.execute("import time\ntime.sleep(600)")
    messages = hasty.iopub_until_idle(cell)
    assert told(messages) == [
        "[sandbox-kernel] The cell has run for its time limit of 1.5 s and is interrupted.\n"
    ]
    assert [m["content"]["ename"] for m in errors(messages)] == ["KeyboardInterrupt"]
    hasty.reply_to(cell)
    assert hasty.run("x + 1") == "42"


def test_cells_in_time_are_left_alone_however_many_there_are(hasty: Kernel) -> None:
    cells = [hasty.client.execute("import time\ntime.sleep(0.5)") for _ in range(5)]
    for cell in cells:
        assert hasty.reply_to(cell)["content"]["status"] == "ok"
        assert told(hasty.iopub_until_idle(cell)) == []


def test_the_clock_of_a_cell_does_not_stop_at_an_answer_that_the_code_forges(hasty: Kernel) -> None:
    # The kernel's own code can answer for the cell, as it has the key; the next cell then waits on its time.
    forge = (
        "import time\nkernel = get_ipython().kernel\n"
        "parent = kernel.get_parent('shell')\n"
        "kernel.session.send(kernel.shell_stream, 'execute_reply', {'status': 'ok', 'execution_count': 1},"
        " parent, ident=kernel._parent_ident['shell'] if hasattr(kernel, '_parent_ident') else None)\n"
        "kernel.shell_stream.flush()\n"
        "time.sleep(600)"
    )
    hasty.client.execute(forge)
    following = hasty.client.execute("1")
    began = time.monotonic()
    hasty.reply_to(following)
    assert time.monotonic() - began < READY / 2


STUBBORN = {
    "catches it": "import time\nwhile True:\n    try: time.sleep(600)\n    except KeyboardInterrupt: pass",
    "blocks in C": "sum(range(10**15))",
    "waits for a child": (
        "import os, signal\nchild = os.fork()\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "while child == 0: pass\nos.waitpid(child, 0)"
    ),
}


@pytest.mark.parametrize("code", STUBBORN.values(), ids=STUBBORN)
def test_a_cell_that_does_not_take_its_interrupt_is_ended_with_its_vm(installed: None, code: str) -> None:
    with microvm(cell_timeout=1, cell_grace=1.5) as kernel:
        cell = kernel.client.execute(code)
        queued = kernel.client.execute("'never'")
        messages = kernel.iopub_until_idle(cell)
        interrupt, stacks = told(messages)
        assert "is interrupted" in interrupt
        assert "What the kernel's threads are doing:" in stacks
        assert "most recent call first" in stacks
        [error] = errors(messages)
        assert error["content"]["ename"] == "CellTimeLimitExceeded"
        assert "time limit of 1 s" in error["content"]["evalue"]
        record = error["metadata"]["sandbox_kernel"]
        assert (record["limit"], record["unit"]) == (1, "s")
        assert 4 <= record["peak"] < 20
        reply = kernel.reply_to(cell)
        assert (reply["content"]["status"], reply["content"]["evalue"]) == (
            "error",
            error["content"]["evalue"],
        )
        assert kernel.reply_to(queued)["content"]["status"] == "aborted"
        assert until(lambda: not kernel.manager.is_alive(), READY)


def test_a_kernel_that_stopped_itself_is_woken_and_interrupted(installed: None) -> None:
    with microvm(cell_timeout=1, cell_grace=5) as kernel:
        kernel.run("x = 1")
        cell = kernel.client.execute(
            "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass"
        )
        messages = kernel.iopub_until_idle(cell)
        assert [m["content"]["ename"] for m in errors(messages)] == ["KeyboardInterrupt"]
        assert kernel.run("x") == "1"


def test_input_that_nobody_gives_counts_as_running(hasty: Kernel) -> None:
    cell = hasty.client.execute("input()", allow_stdin=True)
    messages = hasty.iopub_until_idle(cell)
    assert len(told(messages)) == 1
    assert [m["content"]["ename"] for m in errors(messages)] == ["KeyboardInterrupt"]


def test_a_vm_ends_when_it_is_idle_but_not_while_a_cell_runs(installed: None) -> None:
    with microvm(idle_timeout=3) as kernel:
        kernel.run("import time; time.sleep(4)")
        began = time.monotonic()
        assert until(lambda: not kernel.manager.is_alive(), READY)
        assert time.monotonic() - began > 2
        provisioner = kernel.manager.provisioner
        assert provisioner.handle.death.name == "IdleTimeLimitExceeded"


def test_a_vm_ends_at_its_lifetime_and_the_running_cell_is_told(installed: None) -> None:
    with microvm(lifetime=6) as kernel:
        cell = kernel.client.execute("while True: pass")
        [error] = errors(kernel.iopub_until_idle(cell))
        assert error["content"]["ename"] == "LifetimeLimitExceeded"
        assert kernel.reply_to(cell)["content"]["ename"] == "LifetimeLimitExceeded"


def test_output_beyond_its_limit_is_left_out_and_the_cell_goes_on(installed: None) -> None:
    with microvm(output=0.5) as kernel:
        cell = kernel.client.execute("for _ in range(3000): print('x' * 1000)\n'done'")
        messages = kernel.iopub_until_idle(cell)
        own = sum(len(m["content"]["text"]) for m in messages if m["msg_type"] == "stream")
        assert own < 0.6 * (1 << 20)
        assert len(told(messages)) == 1
        assert kernel.reply_to(cell)["content"]["status"] == "ok"
        assert kernel.run("'next'") == "'next'"


def enforceable() -> dict[str, str]:
    """The controllers that this host lacks, with reasons."""
    group = cgroup.create(f"test-{os.getpid()}", cgroup.Bounds(64, 1, 1.0))
    for folder in group.folders:
        folder.rmdir()
    return dict(group.missing)


def test_a_vm_takes_no_more_of_the_hosts_cpu_than_its_quota(installed: None) -> None:
    if reasons := enforceable():
        pytest.skip(f"this host has no controller for it: {reasons}")
    with microvm(cpu_quota=0.3) as kernel:
        cell = kernel.client.execute(
            "import time\nend = time.monotonic() + 6\nwhile time.monotonic() < end: pass"
        )
        time.sleep(2)
        before = sum(kernel.qemu.cpu_times()[:2])
        time.sleep(3)
        assert 0.5 < sum(kernel.qemu.cpu_times()[:2]) - before < 1.3
        kernel.reply_to(cell)


def test_a_limit_that_this_host_does_not_enforce_is_refused_or_told_in_the_log(
    installed: None, tmp_path: Path
) -> None:
    # As on a host where this user has no cgroup: in a namespace, with nothing mounted where they are.
    code = (
        "from tests.microvm import microvm\n"
        "with microvm(cpu_quota=0.5, unenforced='warn') as kernel:\n"
        "    print(kernel.run('6 * 7'))\n"
        "    log = kernel.manager.provisioner.report['logs'] + '/supervisor.log'\n"
        "    print([line for line in open(log) if 'enforce' in line][0])\n"
        "try:\n"
        "    with microvm(cpu_quota=0.5, unenforced='refuse') as kernel: pass\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
            'mount -t tmpfs none /sys/fs/cgroup && exec "$@"',
            *("sh", sys.executable, "-c", code),
        ],
        capture_output=True,
        text=True,
        timeout=READY,
        env=os.environ | {"XDG_RUNTIME_DIR": str(run)},
    )
    answer, warning, refusal = (line for line in done.stdout.splitlines() if line)
    assert answer == "42"
    assert (
        "this host does not enforce all limits: what QEMU takes beyond the guest's `memory` is not" in warning
    )
    assert "`cpu_quota` is not bounded (not mounted at /sys/fs/cgroup/cpu)" in warning
    assert refusal.startswith("HostError This host does not enforce all limits (")
    assert refusal.endswith("delegated to this user, or choose unenforced = 'warn'.")
