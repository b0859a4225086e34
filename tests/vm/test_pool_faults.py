"""A pool that is killed, whenever: what it gave goes on, nothing else is left, kernels start without it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.microvm import READY, Kernel, alive, manager, microvm, traces, until
from tests.vm.pools import Pool, pool, started
from tests.vm.test_cleanup import LIMIT


def kill(victim: Pool, spared: int | None, runtime: Path) -> None:
    """Kills a pool; all of it must be gone but for the supervisor `spared`, which was given away."""
    kept = []
    if spared is not None:
        supervisor = psutil.Process(spared)
        kept = [supervisor, *supervisor.children(recursive=True)]
    others = [each for each in victim.family() if each not in kept]
    waiting = [vm["id"] for vm in victim.vms()]
    victim.process.kill()
    assert until(lambda: not alive(others), LIMIT), alive(others)
    left = [trace for vm in waiting for trace in traces(vm)]
    assert until(lambda: not [trace for vm in waiting for trace in traces(vm)], LIMIT), left
    assert until(lambda: not (runtime / "pool-service").exists(), LIMIT)
    victim.process.wait()


def a_kernel_starts_without() -> None:
    with microvm() as kernel:
        assert started(kernel) == "restored"
        assert kernel.run("6 * 7") == "42"


@contextmanager
def held(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile, so that what others want of it is under way."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        go_on(pid)


def go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def under_way(what: Callable[[], object]) -> Iterator[None]:
    """Something that is done meanwhile; it must come to its end, and not fail."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            what()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(READY)
    assert not thread.is_alive()
    assert not failed, failed


def filling(size: int) -> bool:
    """Whether `size` QEMUs belong to this process's pool by now."""
    found = psutil.Process().children(recursive=True)
    return len([each for each in found if each.name().startswith("qemu")]) >= size


def test_a_pool_killed_before_its_first_vm_leaves_nothing(runtime: Path) -> None:
    with pool() as mine:
        assert until(lambda: (runtime / "pool-service" / "socket").exists(), READY)
        kill(mine, None, runtime)
        a_kernel_starts_without()


def test_a_pool_killed_while_its_vms_are_restored_leaves_nothing(runtime: Path) -> None:
    with pool(size=2) as mine:
        assert until(lambda: filling(1), READY)
        assert len(mine.ready()) < 2
        kill(mine, None, runtime)
        a_kernel_starts_without()


def test_a_pool_killed_while_its_vms_wait_leaves_nothing_and_another_one_can_be_had(runtime: Path) -> None:
    with pool() as first:
        first.wait()
        kill(first, None, runtime)
    with pool() as second:
        second.wait()
        with microvm() as kernel:
            assert started(kernel) == "pooled"
            assert kernel.run("6 * 7") == "42"


def test_a_pool_killed_while_a_kernel_of_its_starts_does_not_stop_it(runtime: Path) -> None:
    with pool() as mine:
        (waiting,) = mine.wait()
        made = manager()
        with held(waiting["pid"]), under_way(made.start_kernel):
            assert until(lambda: mine.told()["given"] == 1, READY)
            kill(mine, waiting["pid"], runtime)
            go_on(waiting["pid"])
        kernel = Kernel(made)
        try:
            assert started(kernel) == "pooled"
            assert kernel.run("6 * 7") == "42"
        finally:
            kernel.client.stop_channels()
            made.shutdown_kernel(now=True)
        assert not traces(made.provisioner._vm_id())


PHASES: dict[str, Callable[[Kernel], object]] = {
    "is_idle": lambda kernel: None,
    "is_interrupted": lambda kernel: kernel.manager.interrupt_kernel(),
    "restarts": lambda kernel: kernel.manager.restart_kernel(),
    "shuts_down": lambda kernel: kernel.manager.shutdown_kernel(),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_pool_killed_while_a_kernel_of_its(runtime: Path, phase: str) -> None:
    with pool() as mine:
        mine.wait()
        with microvm() as kernel:
            assert started(kernel) == "pooled"
            given = kernel.manager.provisioner.pid
            mine.wait()
            with held(given), under_way(lambda: PHASES[phase](kernel)):
                kill(mine, given, runtime)
                go_on(given)
            if phase == "restarts":
                kernel.client.wait_for_ready(timeout=READY)
            if phase != "shuts_down":
                assert kernel.run("6 * 7") == "42"
            vm = kernel.manager.provisioner._vm_id()
        assert not traces(vm)
        a_kernel_starts_without()


def test_a_pool_killed_while_a_cell_of_its_kernels_runs_is_not_noticed_there(runtime: Path) -> None:
    with pool() as mine:
        mine.wait()
        with microvm() as kernel:
            assert started(kernel) == "pooled"
            cell = kernel.client.execute("import time\nprint('begun', flush=True)\ntime.sleep(3)\n6 * 7")
            while kernel.client.get_iopub_msg(timeout=READY)["msg_type"] != "stream":
                pass
            kill(mine, kernel.manager.provisioner.pid, runtime)
            assert kernel.reply_to(cell)["content"]["status"] == "ok"
            assert kernel.run("Out[1]") == "42"
