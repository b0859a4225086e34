"""Whoever is killed, whenever: nothing is left, and the next kernel starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.errors import GuestError
from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.paths import runtime_dir
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import nursery
from sandbox_kernel.template.key import TemplateKey
from sandbox_kernel.template.store import Template, TemplateStore
from tests.microvm import READY, Kernel, alive, manager, microvm, traces, until
from tests.vm.pools import started

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


@pytest.mark.parametrize("victim", ["client", "supervisor"])
def test_a_sudden_death_before_there_is_a_vm_leaves_nothing(installed: None, victim: str) -> None:
    with client("starting", "auto") as (process, _):
        assert until(lambda: bool(of_its_vm(process, "supervisor")), READY)
        [supervisor] = of_its_vm(process, "supervisor")
        supervisor.suspend()
        everyone = process.children(recursive=True)
        assert not of_its_vm(process, "qemu-system")
        (process if victim == "client" else supervisor).kill()
        supervisor.resume()
        assert until(lambda: not alive(everyone), LIMIT), alive(everyone)


def test_a_client_killed_before_its_supervisor_runs_leaves_nothing(installed: None) -> None:
    with client("starting", "auto") as (process, _):
        everyone = process.children(recursive=True)
        process.kill()
        assert not of_its_vm(process, "qemu-system")
        assert until(lambda: not alive([process, *everyone]), LIMIT)


def test_a_supervisor_killed_before_there_is_a_vm_is_told_in_a_sentence_and_the_next_start_works(
    installed: None,
) -> None:
    nursery.close()  # so that the supervisor is a new interpreter, which takes its time
    made = manager()
    mine = psutil.Process()

    def kill_it() -> None:
        assert until(lambda: bool(of_its_vm(mine, "supervisor")), READY)
        [supervisor] = of_its_vm(mine, "supervisor")
        assert not of_its_vm(mine, "qemu-system")
        supervisor.kill()

    with ThreadPoolExecutor(1) as threads:
        killed = threads.submit(kill_it)
        with pytest.raises(
            GuestError, match=r"The VM's supervisor \(process \d+\) has ended; restart the kernel\."
        ):
            made.start_kernel()
        killed.result()
    assert not traces(made.provisioner._vm_id())
    made.start_kernel()
    kernel = Kernel(made)
    assert kernel.run("6 * 7") == "42"
    kernel.client.stop_channels()
    made.shutdown_kernel(now=True)


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


@pytest.fixture
def copied(installed: None, own_store: TemplateStore) -> Template:
    """A copy of the usual template in a store of its own, of which nobody else has anything."""
    with pytest.MonkeyPatch.context() as usual:
        usual.delenv("XDG_DATA_HOME")
        original = template.ensure(VMSpec(), Silent())
    key = TemplateKey(**original.key | {"modules": tuple(original.key["modules"])})
    with own_store.make(key) as staging:
        assert staging is not None
        for file in (original.ram, original.state):
            subprocess.run(["cp", "--sparse=always", file, staging], check=True)
        return own_store.publish(staging, key, original.qemu)


def test_a_template_deleted_while_in_use_costs_its_kernels_nothing_and_the_next_ones_boot(
    copied: Template,
) -> None:
    with microvm() as kernel:
        assert started(kernel) == "restored"
        assert until(lambda: nursery._waiting is not None, READY)  # another VM that has loaded it
        shutil.rmtree(copied.directory)
        # Memory that nobody has looked at yet: it comes from the file.
        assert kernel.run("import sys, ctypes, sqlite3, xml.dom.minidom; 6 * 7") == "42"
        kernel.manager.restart_kernel()
        kernel.client.wait_for_ready(timeout=READY)
        assert started(kernel) == "cold"
        assert kernel.run("6 * 7") == "42"


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
