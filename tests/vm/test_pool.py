"""Kernels from a pool: at once, each VM once, and nothing of it left when anybody dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.microvm import READY, alive, microvm, traces, until
from tests.vm import pools
from tests.vm.pools import Pool, started
from tests.vm.test_cleanup import CLIENT, LIMIT
from tests.vm.test_template import SOURCES


@pytest.fixture
def pool(runtime: Path) -> Iterator[Pool]:
    with pools.pool() as made:
        made.wait()
        yield made


def test_a_kernel_from_the_pool_is_as_new_and_another_vm_takes_its_place(pool: Pool) -> None:
    (first,) = pool.ready()
    with microvm() as kernel:
        assert started(kernel) == "pooled"
        assert kernel.manager.provisioner.pid == first["pid"]
        assert kernel.run("6 * 7") == "42"
        assert kernel.run("[_, In[1], Out]") == "[42, '6 * 7', {1: 42}]"
        where = kernel.run("import os, platform; print(os.getcwd(), platform.node())")
        assert where == "/home/sandbox sandbox"
        (second,) = pool.wait()
        assert second["id"] != first["id"]
        assert traces(kernel.manager.provisioner._vm_id())
    assert not traces(kernel.manager.provisioner._vm_id())
    assert not traces(first["id"])
    assert pool.told()["given"] == 1


def test_kernels_from_the_pool_share_no_secret_and_have_the_hosts_time(pool: Pool) -> None:
    found: list[dict[str, list[Any]]] = []
    for _ in range(4):
        pool.wait()
        with microvm() as kernel:
            assert started(kernel) == "pooled"
            before = time.time()
            clock = float(kernel.run("import time; print(time.time())"))
            assert before - 0.05 <= clock <= time.time() + 0.05
            found.append(json.loads(kernel.run(SOURCES)))
    for source in found[0]:
        values = [value for each in found for value in each[source]]
        assert len(values) == len(set(values)), f"{source} repeats"


def test_another_configuration_is_started_without_a_vm_of_the_pools(pool: Pool) -> None:
    with microvm(start="cold") as kernel:
        assert started(kernel) == "cold"
        assert kernel.run("6 * 7") == "42"
    assert len(pool.ready()) == 1
    assert pool.told()["given"] == 0


def test_many_at_once_get_each_vm_once(pool: Pool) -> None:
    def one(number: int) -> tuple[str, str]:
        with microvm() as kernel:
            assert kernel.run(f"{number} * 7") == str(number * 7)
            return started(kernel), kernel.run("open('/etc/machine-id').read()")

    with ThreadPoolExecutor(3) as threads:
        kernels = list(threads.map(one, range(3)))
    assert [how for how, _ in kernels].count("pooled") <= 2  # a second one may have come in time
    assert len({machine for _, machine in kernels}) == 3


def test_a_restart_keeps_the_endpoints_and_takes_the_next_vm(pool: Pool) -> None:
    with microvm() as kernel:
        first = kernel.manager.provisioner.pid
        pool.wait()
        kernel.manager.restart_kernel()
        kernel.client.wait_for_ready(timeout=READY)
        assert started(kernel) == "pooled"
        assert kernel.manager.provisioner.pid != first
        assert kernel.run("6 * 7") == "42"


def test_an_exit_status_reaches_a_client_that_is_not_the_parent(pool: Pool) -> None:
    with microvm() as kernel:
        assert started(kernel) == "pooled"
        kernel.client.execute("import os; os._exit(3)")
        assert until(lambda: not kernel.manager.is_alive(), READY)
        assert kernel.manager.provisioner._handle.poll() == 3


def test_a_pool_that_is_told_to_end_takes_what_waits_with_it(pool: Pool) -> None:
    everybody = pool.family()
    assert any("qemu" in each.name() for each in everybody)
    pool.end()
    assert not alive(everybody)


def test_a_killed_client_takes_its_vm_with_it(pool: Pool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    (waiting,) = pool.ready()
    vm, supervisor = process.stdout.readline().split()
    assert int(supervisor) == waiting["pid"]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert until(lambda: not traces(vm) and not traces(waiting["id"]), LIMIT)
    assert not psutil.pid_exists(int(supervisor))


def test_a_vm_that_dies_while_it_waits_is_replaced(pool: Pool) -> None:
    (waiting,) = pool.ready()
    for child in psutil.Process(waiting["pid"]).children(recursive=True):
        if "qemu" in child.name():
            child.kill()
    assert until(lambda: [vm["id"] for vm in pool.ready()] not in ([], [waiting["id"]]), READY)
    assert not traces(waiting["id"])
    with microvm() as kernel:
        assert started(kernel) == "pooled"
    assert re.search(f"the VM {waiting['id']} has ended while it waited", pool.end())


def test_a_user_has_one_pool(pool: Pool) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "sandbox_kernel.cli.main", "pool"],
        capture_output=True,
        text=True,
        timeout=READY,
        check=False,
    )
    assert second.returncode == 1
    assert "A pool of this user runs already; `sandbox-kernel pool status` shows it." in second.stderr
    assert pool.ready()


def test_a_vm_that_is_too_old_is_replaced(runtime: Path) -> None:
    pool = Pool("--max-age", "3")
    try:
        (first,) = pool.wait()
        assert until(lambda: [vm["id"] for vm in pool.ready()] not in ([], [first["id"]]), READY)
    finally:
        log = pool.end()
    assert f"the VM {first['id']} ends: it is older than 3 s" in log


def test_a_ceiling_too_low_for_one_is_said(runtime: Path) -> None:
    pool = Pool("--memory", "10")
    try:
        assert until(lambda: pool.process.poll() is not None or _why_not(pool), READY)
        assert _why_not(pool) == "one more would need 160 MiB and the ceiling is 10 MiB"
        with microvm() as kernel:  # the pool's zygote still spares it an interpreter
            assert started(kernel) == "restored"
            assert kernel.run("6 * 7") == "42"
    finally:
        pool.end()


def _why_not(pool: Pool) -> str:
    try:
        return str(pool.told()["why_not"])
    except Exception:
        return ""


def test_a_pooled_kernel_has_its_network_closed_until_it_is_its_own(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        threading.Thread(target=_greet, args=(service,), daemon=True).start()
        config = {"network": "allowlist", "host_services": [str(port)]}
        monkeypatch.setenv("SANDBOX_KERNEL_NETWORK", "allowlist")
        monkeypatch.setenv("SANDBOX_KERNEL_HOST_SERVICES", str(port))
        call = f"socket.create_connection(('host.internal', {port}), 5)"
        reach = f"import socket; print({call}.recv(9).decode())"
        with pools.pool() as pool:
            pool.wait()
            for _ in range(2):  # one after the other, each with a network of its own
                with microvm(**config) as kernel:
                    assert started(kernel) == "pooled"
                    assert kernel.run(reach) == "hello"
                    pool.wait()
            with microvm(**config, network_connections=1) as kernel:
                assert started(kernel) == "pooled", "policies are not of the VM"
                with pytest.raises(RuntimeError, match=r"refused|timed out|reset"):
                    kernel.run(f"import socket; kept = {call}; {reach}")


def _greet(service: socket.socket) -> None:
    kept = []
    with contextlib.suppress(OSError):
        while True:
            kept.append(service.accept()[0])
            kept[-1].sendall(b"hello")
