"""Whoever is killed, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.paths import log_dir
from tests.microvm import READY, alive, microvm, traces, until

LIMIT = 2.0
"""Seconds within which everything of a killed kernel must be gone (SPECIFICATION.md, 'Clean-up')."""

CLIENT = textwrap.dedent(
    """
    import sys
    from jupyter_client import KernelManager

    km = KernelManager(kernel_name="python3-microvm")
    km.start_kernel()
    provisioner = km.provisioner
    print(provisioner._vm_id(), provisioner.pid, flush=True)
    sys.stdin.read()
    """
)


@contextmanager
def client() -> Iterator[tuple[subprocess.Popen[str], str, psutil.Process]]:
    """A client's process with a kernel: (process, id of its VM, supervisor)."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        vm, supervisor = process.stdout.readline().split()
        yield process, vm, psutil.Process(int(supervisor))
    finally:
        process.kill()
        process.communicate()


def test_a_killed_client_leaves_nothing(installed: None) -> None:
    with client() as (process, vm, _):
        assert traces(vm)
        os.kill(process.pid, signal.SIGKILL)
        assert until(lambda: not traces(vm), LIMIT), traces(vm)


def test_a_killed_supervisor_leaves_nothing(installed: None) -> None:
    with client() as (_, vm, supervisor):
        supervisor.kill()
        assert until(lambda: not traces(vm), LIMIT), traces(vm)


def test_a_killed_qemu_leaves_nothing_but_the_logs_that_the_error_names(installed: None) -> None:
    with client() as (_, vm, supervisor):
        qemu = [child for child in supervisor.children(recursive=True) if "qemu" in child.name()]
        assert qemu
        for process in qemu:
            process.kill()
        assert until(lambda: not traces(vm), LIMIT), traces(vm)
        assert list(log_dir().glob(f"{vm}-*"))


def test_a_killed_guardian_does_not_keep_an_orderly_stop_from_cleaning_up(installed: None) -> None:
    with client() as (process, vm, supervisor):
        for child in supervisor.children():
            if child.name() == "sh":
                child.kill()
        process.communicate("")
        assert until(lambda: not traces(vm), LIMIT), traces(vm)


@pytest.mark.parametrize("delay", [0.1, 0.4, 1.0, 2.5, 5.0])
def test_a_client_killed_while_its_kernel_starts_leaves_nothing(installed: None, delay: float) -> None:
    before = set(psutil.pids())
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    born: list[psutil.Process] = []

    def supervisor_started() -> bool:
        born[:] = psutil.Process(process.pid).children()
        return bool(born)

    assert until(supervisor_started, READY)
    until(lambda: False, delay)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert until(lambda: not alive(everyone), LIMIT), alive(everyone)
    assert until(lambda: not _new_leftovers(before), LIMIT), _new_leftovers(before)


def _has_a_client(process: psutil.Process) -> bool:
    """Whether a VM's process belongs to a client that lives; another suite may be running beside this one."""
    ours = ("qemu-system", "bwrap", "sandbox_kernel.supervisor")
    try:
        above = [" ".join(parent.cmdline()) for parent in process.parents() if parent.pid != 1]
    except psutil.NoSuchProcess:
        return True  # gone meanwhile
    return any("python" in words and not any(name in words for name in ours) for words in above)


def _new_leftovers(before: set[int]) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if (
            process.info["pid"] not in before
            and process.info["uids"].real == os.getuid()
            and ("qemu-system" in words or "sandbox_kernel.supervisor" in words)
            and not _has_a_client(process)
        ):
            found.append(words)
    return found


def test_logs_of_an_orderly_kernel_are_removed(installed: None) -> None:
    with microvm() as kernel:
        vm = kernel.manager.provisioner._vm_id()
        # Named after the kernel, or after the VM that waited for one.
        logs = Path(kernel.manager.provisioner.report["logs"])
        assert (logs / "console.log").exists()
    assert not logs.exists()
    assert not traces(vm)
