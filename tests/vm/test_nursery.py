"""A client's second supervisor is forked from a zygote of its own, which ends with the client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sandbox_kernel.host import template as host
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import nursery
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
    time.sleep(2.5)  # there is a zygote now
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
            second.client.execute("import os; os._exit(3)")
            assert until(lambda: not second.manager.is_alive(), READY)
            assert second.manager.provisioner._handle.poll() == 3
        assert first.run("6 * 7") == "42"


def test_a_killed_zygote_costs_nothing_but_time() -> None:
    with microvm() as first:
        assert until(lambda: zygotes(os.getpid()), READY)
        with microvm() as second:
            (zygote,) = zygotes(os.getpid())
            zygote.kill()
            assert second.run("6 * 7") == "42"
            with microvm() as third:
                assert parent(third) == os.getpid()
                assert third.run("6 * 7") == "42"
        assert first.run("6 * 7") == "42"


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
