"""Whoever is killed, whenever: nothing is left, and the next kernel starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.paths import runtime_dir
from tests.microvm import READY, Kernel, alive, manager, microvm, traces, until

LIMIT = 2.0
"""Seconds within which everything of a killed kernel must be gone (SPECIFICATION.md, 'Clean-up')."""

CLIENT = textwrap.dedent(
    """
    import contextlib, sys, threading, time
    from tests.microvm import READY, manager

    phase, start = sys.argv[1:]
    km = manager(start=start)
    def say(what):
        print(what, flush=True)
    say("begins")
    if phase == "starting":
        say("-")
    km.start_kernel()
    vm = km.provisioner._vm_id()
    client = km.client()
    client.start_channels()
    client.wait_for_ready(timeout=READY)
    if phase in ("in a cell", "interrupting"):
        client.execute("while True:\\n try:\\n  while True: pass\\n except KeyboardInterrupt: pass")
        while client.get_iopub_msg(timeout=READY)["msg_type"] != "execute_input":
            pass
    say(vm)
    with contextlib.suppress(Exception):
        if phase == "interrupting":
            while True:
                km.interrupt_kernel()
        if phase == "shutting down":
            km.shutdown_kernel()
    sys.stdin.read()
    """
)


@contextmanager
def client(phase: str, start: str) -> Iterator[tuple[psutil.Process, str]]:
    """A client's process that has come to a phase, and the id of its VM ("-" when nobody knows yet)."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, phase, start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begins\n"
        yield psutil.Process(process.pid), process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def of_its_vm(process: psutil.Process, name: str) -> list[psutil.Process]:
    """Processes below a client, by name."""
    found = []
    for child in process.children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        if name in words.split(" ")[0] or (name == "supervisor" and "sandbox_kernel.supervisor" in words):
            found.append(child)
    return found


PHASES = ["starting", "idle", "in a cell", "interrupting", "shutting down"]
STARTS = {"restored": "auto", "cold": "cold"}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["client", "supervisor", "qemu-system"])
def test_a_sudden_death_leaves_nothing(installed: None, victim: str, phase: str, start: str) -> None:
    with client(phase, STARTS[start]) as (process, vm):
        found: list[psutil.Process] = [process]

        def there() -> bool:
            if victim != "client":
                found[:] = of_its_vm(process, victim)
            return bool(found)

        if phase == "starting" or victim == "client":
            assert until(lambda: bool(of_its_vm(process, "qemu-system")), READY)
        there()
        everyone = process.children(recursive=True)
        for each in found:
            os.kill(each.pid, signal.SIGKILL)
        if victim == "client":
            assert until(lambda: not alive(everyone), LIMIT), alive(everyone)
        if vm != "-":
            assert until(lambda: not traces(vm), LIMIT), traces(vm)
    assert until(lambda: not alive(everyone), LIMIT), alive(everyone)


def test_after_all_of_that_a_kernel_starts(installed: None) -> None:
    with microvm() as kernel:
        assert kernel.run("1 + 1") == "2"


def test_a_runtime_folder_that_is_deleted_costs_new_clients_and_nothing_else(installed: None) -> None:
    with microvm() as kernel:
        vm = kernel.manager.provisioner.report["id"]
        shutil.rmtree(runtime_dir() / vm)
        assert kernel.run("1 + 1") == "2"
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=READY)
        assert kernel.run("1 + 1") == "2"
    assert not traces(vm)


def test_two_managers_with_one_connection_file_have_a_kernel_each(installed: None, tmp_path: Path) -> None:
    managers = [manager() for _ in range(2)]
    for made in managers:
        made.connection_file = str(tmp_path / "kernel.json")
        made.start_kernel()
    try:
        kernels = [Kernel(made) for made in managers]
        for number, kernel in enumerate(kernels):
            kernel.run(f"x = {number}")
        assert [kernel.run("x") for kernel in kernels] == ["0", "1"]
        for kernel in kernels:
            kernel.client.stop_channels()
    finally:
        for made in managers:
            made.shutdown_kernel(now=True)
    assert not [trace for made in managers for trace in traces(made.provisioner._vm_id())]
