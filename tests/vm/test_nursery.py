"""A client's second supervisor is forked from a zygote of its own, which ends with the client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.errors import HostError
from sandbox_kernel.host import template as host
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.paths import log_dir, runtime_dir
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import Nursery, nursery
from sandbox_kernel.supervisor.zygote import Zygote
from sandbox_kernel.template.store import TemplateStore
from tests.microvm import READY, Kernel, alive, microvm, traces, until

LIMIT = 2.0
ZYGOTE = "sandbox_kernel.supervisor.zygote"
FORKING = textwrap.dedent(
    """
    import os, sys, time
    from jupyter_client import KernelManager

    def kernel():
        km = KernelManager(kernel_name="python3-microvm")
        km.start_kernel()
        client = km.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=90)
        return km

    one = kernel()
    time.sleep(4)  # there is a zygote now, and a VM that waits
    child = os.fork()
    if child == 0:
        kernel().shutdown_kernel(now=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    two = kernel()
    print(two.provisioner._vm_id(), two.provisioner.pid, flush=True)
    sys.stdin.read()
    """
)


@pytest.fixture(autouse=True)
def own_nursery(installed: None) -> Iterator[None]:
    host.ensure(VMSpec(), Silent())
    nursery.close()
    yield
    nursery.close()


def zygotes(parent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children() if ZYGOTE in child.cmdline()]


def waiting() -> psutil.Process | None:
    """The supervisor of the VM that waits for this process's next kernel."""
    found = nursery._waiting
    return psutil.Process(found.handle.pid) if found is not None else None


def parent(kernel: Kernel) -> int:
    return int(kernel.supervisor.ppid())


def test_the_second_kernel_of_a_client_is_forked() -> None:
    with microvm() as first:
        assert parent(first) == os.getpid()
        assert until(lambda: zygotes(os.getpid()), READY)
        (zygote,) = zygotes(os.getpid())
        with microvm() as second:
            assert parent(second) == zygote.pid
            assert second.run("6 * 7") == "42"
            assert second.manager.provisioner.report["start"] == "restored"
            second.client.execute("import os; os._exit(3)")
            assert until(lambda: not second.manager.is_alive(), READY)
            assert second.manager.provisioner._handle.poll() == 3
        assert first.run("6 * 7") == "42"


def test_supervisors_that_are_forked_at_the_same_time_are_not_mixed_up() -> None:
    zygote = Zygote()
    with ThreadPoolExecutor(8) as threads:
        handles = list(threads.map(lambda _: zygote.supervisor(), range(64)))
    try:
        for handle in handles:
            handle.stop()  # its own socket
            assert handle.wait() == 0  # its own process
    finally:
        zygote.close()


def test_a_killed_zygote_costs_nothing_but_time() -> None:
    with microvm() as first:
        assert until(waiting, READY)
        (zygote,) = zygotes(os.getpid())
        zygote.kill()
        with microvm() as second, microvm() as third:
            assert parent(second) not in (os.getpid(), zygote.pid)
            assert parent(third) == os.getpid()
            assert (second.run("6 * 7"), third.run("6 * 7")) == ("42", "42")
        assert first.run("6 * 7") == "42"


def test_the_next_vm_waits_with_a_guest_that_has_not_run_and_is_used_once() -> None:
    with microvm() as first:
        assert until(waiting, READY)
        supervisor = waiting()
        used = sum(child.cpu_times().user for child in supervisor.children(recursive=True))
        with microvm() as second, microvm() as third:
            assert second.supervisor == supervisor != third.supervisor
            assert {kernel.manager.provisioner.report["start"] for kernel in (second, third)} == {"restored"}
            ids = {kernel.run("open('/proc/sys/kernel/random/boot_id').read()") for kernel in (second, third)}
            assert len(ids) == 2
        assert used < 0.2
        assert first.run("6 * 7") == "42"


def test_a_vm_of_another_size_is_not_the_one_that_waits() -> None:
    with microvm():
        assert until(waiting, READY)
        supervisor = waiting()
        with microvm(start="cold") as second:
            assert second.supervisor != supervisor
            assert second.manager.provisioner.report["start"] == "cold"
        assert not alive([supervisor])


def test_a_vm_that_waits_with_an_old_template_is_not_used() -> None:
    store = TemplateStore()
    with microvm():
        assert until(waiting, READY)
        supervisor = waiting()
        store.remove(store.all()[0].digest)
        host.ensure(VMSpec(), Silent())
        with microvm() as second:
            assert second.supervisor != supervisor
            assert second.manager.provisioner.report["start"] == "restored"
            assert second.run("6 * 7") == "42"
        assert until(lambda: not alive([supervisor]), LIMIT)


def test_a_start_after_which_nothing_is_to_be_done_lets_what_waits_end_in_time() -> None:
    own = Nursery(after=0.05, keep=1.0)
    own.warm(VMSpec())
    assert own._waiting is not None
    own.expect(VMSpec())
    assert until(lambda: own._waiting is None, LIMIT)
    own.close()


def test_without_a_template_nothing_is_begun_and_no_log_kept() -> None:
    logs = set(log_dir().iterdir())
    own = Nursery()
    own.warm(VMSpec(memory=333))
    assert own._waiting is None
    assert set(log_dir().iterdir()) <= logs
    own.close()


def test_what_is_being_made_ready_ends_with_its_nursery() -> None:
    own = Nursery()
    thread = threading.Thread(target=own.warm, args=(VMSpec(),))
    thread.start()
    assert until(lambda: own._coming is not None, READY)
    assert own._coming is not None
    supervisor = psutil.Process(own._coming.pid)
    own.close()
    thread.join(READY)
    assert own._waiting is None
    assert until(lambda: not alive([supervisor]), LIMIT)


def test_who_warms_what_is_being_warmed_waits_for_it() -> None:
    own = Nursery()
    thread = threading.Thread(target=own.warm, args=(VMSpec(),))
    thread.start()
    assert until(lambda: own._coming is not None, READY)
    own.warm(VMSpec())
    assert own._waiting is not None
    thread.join(READY)
    own.close()


def test_a_zygote_that_was_late_once_is_not_asked_again() -> None:
    zygote = Zygote()
    os.kill(zygote.pid, signal.SIGSTOP)
    zygote._socket.settimeout(0.1)
    with pytest.raises(HostError, match=rf"restart process {os.getpid()}, whose it is"):
        zygote.fork()
    os.kill(zygote.pid, signal.SIGCONT)
    with pytest.raises(HostError):
        zygote.fork()
    zygote.close()


def test_what_nobody_wants_for_a_while_ends() -> None:
    own = Nursery(keep=0.5)
    own.warm(VMSpec())
    found = own._waiting
    assert found is not None
    everyone = [*psutil.Process(found.handle.pid).children(recursive=True), psutil.Process(found.handle.pid)]
    assert until(lambda: not alive(everyone), LIMIT)
    assert own.waiting(VMSpec()) is None
    own.close()


def test_another_runtime_directory_is_not_served_by_a_zygote_that_has_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with microvm(), tempfile.TemporaryDirectory(prefix="skn") as folder:
        assert until(lambda: zygotes(os.getpid()), READY)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        with microvm() as kernel:
            assert parent(kernel) == os.getpid()
            assert list(Path(folder).glob(f"sandbox-kernel/{kernel.manager.provisioner._vm_id()}/*"))


def test_a_client_that_forks_and_is_killed_leaves_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    vm, supervisor = process.stdout.readline().split()
    (zygote,) = zygotes(process.pid)
    assert psutil.Process(int(supervisor)).ppid() == zygote.pid
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert until(lambda: not alive(everyone) and not traces(vm), LIMIT), alive(everyone)
    assert until(lambda: not list(runtime_dir().glob("s*")), LIMIT)
