"""Kernels restored from templates: what clones share, what they never do, and what happens without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox_kernel.agent.client import Configuration
from sandbox_kernel.agent.protocol import STANDBY_ARGV
from sandbox_kernel.errors import GuestError
from sandbox_kernel.host import template as host
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.ignition import MachinePlan, ignite
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.store import Template, TemplateStore
from tests.microvm import READY, Kernel, microvm, until

CLONES = 20
VALUES = 30
SOURCES = f"""
import hashlib, json, os, random, secrets, socket, ssl, tempfile, time, uuid
import numpy as np
from jupyter_client.session import new_id
me = get_ipython().kernel
n = {VALUES}
print(json.dumps({{
    "urandom": [os.urandom(16).hex() for _ in range(n)],
    "random": [random.getrandbits(64) for _ in range(n)],
    "numpy": [int(v) for v in np.random.randint(0, 2**62, n)],
    "numpy generator": [int(v) for v in np.random.default_rng().integers(0, 2**62, n)],
    "uuid1": [str(uuid.uuid1()) for _ in range(n)],
    "uuid4": [str(uuid.uuid4()) for _ in range(n)],
    "secrets": [secrets.token_hex(16) for _ in range(n)],
    "tempfile": [tempfile.mktemp() for _ in range(n)],
    "openssl": [ssl.RAND_bytes(16).hex() for _ in range(n)],
    "message ids": [me.session.msg_id for _ in range(n)],
    "key": [hashlib.sha256(me.session.key).hexdigest()],
    "session": [me.session.session],
    "kernel": [me.ident],
    "machine": [open("/etc/machine-id").read().strip()],
    "boot": [open("/proc/sys/kernel/random/boot_id").read().strip()],
}}))
"""


@pytest.fixture(scope="module")
def template(installed: None) -> Template:
    return host.ensure(VMSpec(), Silent())


def started(kernel: Kernel) -> str:
    report: dict[str, Any] = kernel.manager.provisioner.report
    return str(report["start"])


def clone(number: int) -> dict[str, list[Any]]:
    with microvm() as kernel:
        assert started(kernel) == "restored"
        before = time.time()
        clock = float(kernel.run("import time; print(time.time())"))
        after = time.time()
        # The guest's answer lies between the two, give or take 50 ms.
        assert before - 0.05 <= clock <= after + 0.05
        found: dict[str, list[Any]] = json.loads(kernel.run(SOURCES))
        return found


@pytest.mark.timeout(600)
def test_clones_share_no_secret_and_no_identity(template: Template) -> None:
    with ThreadPoolExecutor(2) as pool:
        clones = list(pool.map(clone, range(CLONES)))
    for source in clones[0]:
        values = [value for each in clones for value in each[source]]
        assert len(values) == len(set(values)), f"{source} repeats"
        assert len(values) in (CLONES, CLONES * VALUES)


def test_a_restored_kernel_is_as_new(template: Template) -> None:
    with microvm() as kernel:
        assert started(kernel) == "restored"
        assert kernel.run("6 * 7") == "42"
        assert kernel.run("[_, In[1], Out]") == "[42, '6 * 7', {1: 42}]"
        assert kernel.run("import platform; print(platform.node())") == "sandbox"
        kernel.manager.restart_kernel()
        kernel.client.wait_for_ready(timeout=READY)
        assert started(kernel) == "restored"
        with pytest.raises(RuntimeError, match="NameError"):
            kernel.run("platform")


def test_to_run_a_clones_programs_is_not_to_write_to_them(template: Template) -> None:
    with microvm() as kernel:
        kernel.run("import json, sys, weakref")
        programs = "json.dumps, type(get_ipython()), json"
        immortal = f"[sys.getrefcount(each) == sys.getrefcount(None) for each in ({programs})]"
        assert kernel.run(immortal) == "[True, True, True]"
        kernel.run("class Mine: pass")
        assert kernel.run("sys.getrefcount(Mine) < 100") == "True"
        assert kernel.run("weakref.ref(Mine())() is None") == "True"


def test_two_clones_do_not_see_each_others_memory_and_the_template_stays(template: Template) -> None:
    with microvm() as one, microvm() as other:
        one.run("secret = b'only mine' * 100_000")
        other.run("mine = b'something else' * 100_000")
        assert one.run("secret == b'only mine' * 100_000") == "True"
        with pytest.raises(RuntimeError, match="NameError"):
            other.run("secret")
    assert [each.digest for each in TemplateStore().all()].count(template.digest) == 1


async def test_a_clone_that_rehearses_gets_new_ids_each_time_and_starts_faster(
    template: Template, image: Image, tmp_path: Path
) -> None:
    key = template.key
    plan = MachinePlan(
        *(image, key["memory"], key["vcpus"], key["accelerator"], "userspace", READY, tmp_path),
        Cgroup(()),
        template,
    )
    machine = Machine(ignite(plan))
    connection = {"key": "k", "signature_scheme": "hmac-sha256"}
    ids = []
    try:
        await machine.start()
        for _ in range(2):
            await machine.agent.rehearse(configuration())
            ids += [await machine.agent.read(file) for file in ("/etc/machine-id", "/run/boot_id")]
        began = time.monotonic()
        started = await machine.agent.start(STANDBY_ARGV, {}, connection, configuration=configuration())
        assert time.monotonic() - began < 2  # 10 to 20 ms here
        assert started.adopted
        assert abs(started.clock - time.time_ns()) < 2e9
        ids += [await machine.agent.read(file) for file in ("/etc/machine-id", "/run/boot_id")]
        assert len(set(ids)) == 6
        assert (await machine.agent.status()).alive
        with pytest.raises(GuestError, match="No kernel stands by"):
            await machine.agent.rehearse(configuration())
    finally:
        await machine.stop()


def configuration() -> Configuration:
    return Configuration(time.time_ns(), "sandbox", os.urandom(64), 4096)


def test_cold_means_cold(template: Template) -> None:
    with microvm(start="cold") as kernel:
        assert started(kernel) == "cold"
        assert kernel.run("6 * 7") == "42"
        phases = kernel.manager.provisioner.handle.status()["trace"]
        assert phases["kernel initialised"] > phases["kernel connected"]


def test_an_environment_that_an_interpreter_reads_when_it_starts_gets_one_of_its_own(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("COLOUR", "blue")
    with microvm(env=["PYTHONHASHSEED", "COLOUR"]) as kernel:
        assert (
            kernel.run("import os, sys; print(os.environ['COLOUR'], sys.flags.hash_randomization)")
            == "blue 0"
        )
    with microvm(env=["COLOUR"]) as kernel:
        assert kernel.run("import os; print(os.environ['COLOUR'])") == "blue"


def test_a_template_that_qemu_does_not_take_is_discarded_and_the_kernel_boots(
    installed: None, own_store: TemplateStore
) -> None:
    made = host.ensure(VMSpec(memory=256), Silent())
    made.state.write_bytes(b"no state of any machine" * 1000)
    manifest = made.directory / "manifest.json"
    content = json.loads(manifest.read_text())
    found = made.state.stat()
    content["files"]["state"] = [
        *(found.st_dev, found.st_ino, found.st_size),
        *(found.st_mtime_ns, found.st_ctime_ns),
    ]
    manifest.write_text(json.dumps(content))
    with microvm(memory=256) as kernel:
        assert started(kernel) == "cold"
        assert kernel.run("6 * 7") == "42"
        log = Path(kernel.manager.provisioner.report["logs"], "supervisor.log").read_text()
        assert f"did not restore the template {made.digest}" in log
    assert made.digest not in [each.digest for each in own_store.all()]


def test_the_first_kernel_of_a_kind_makes_the_template_for_the_next(
    installed: None, own_store: TemplateStore
) -> None:
    with microvm(memory=300, preload=["colorsys", "numpy"]) as kernel:
        assert started(kernel) == "cold"
        assert until(own_store.all, READY)
        assert kernel.run("import sys; 'colorsys' in sys.modules") == "False"
    with microvm(memory=300, preload=["numpy", "colorsys"]) as kernel:
        assert started(kernel) == "restored"
        assert kernel.run("import sys; {'colorsys', 'numpy'} <= set(sys.modules)") == "True"
        with pytest.raises(RuntimeError, match="NameError"):
            kernel.run("numpy")


@pytest.mark.parametrize("delay", [0.5, 4.0])
def test_a_killed_maker_leaves_no_vm_and_the_next_one_cleans_up(
    installed: None, own_store: TemplateStore, delay: float
) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-m", "sandbox_kernel.cli.main", "template", "build", "--memory", "260"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert until(lambda: list(own_store.directory.glob(".build-*")), READY)
    time.sleep(delay)
    family = psutil.Process(maker.pid).children(recursive=True)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    assert until(lambda: not [p for p in family if p.is_running() and p.status() != "zombie"], 2.0)
    assert own_store.all() == []
    host.ensure(VMSpec(memory=260), Silent())
    assert len(own_store.all()) == 1
    assert not list(own_store.directory.glob(".build-*"))
