"""Kernels start, run a cell and end, over and over; afterwards nothing is left and nothing has grown.

    SANDBOX_KERNEL_CYCLES=500 python -m pytest tests/vm/test_cycles.py    # the long run; else a few cycles

Cycles are restored from a template and taken from a pool by turns. The client is a process of its own, so
that what is watched does not contain pytest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import pool
from sandbox_kernel.host import template as host
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.jail.cgroup import PREFIX
from sandbox_kernel.jail.cgroup import ROOT as CGROUPS
from sandbox_kernel.paths import cache_dir, data_dir
from sandbox_kernel.spec import VMSpec
from tests.microvm import KERNEL, READY, until

CYCLES = max(4, int(os.environ.get("SANDBOX_KERNEL_CYCLES", "6")))
LONG = 100
"""Cycles from which on growth is a failure; in a short run what is used for the first time is most of it."""
GROWTH = 0.05
NOISE = 2.0
"""MiB: a malloc arena more or less."""
GONE = 2.0
"""Seconds after the end in which everything must be gone (SPECIFICATION.md, 'Clean-up')."""
_SECONDS_EACH = 40
_FIRST = 4
_LOOKS = 10
_OF_A_WAITING_VM = 2
"""Files that a client has open for one: its socket, and its process."""
_WAYS = ("restored", "pooled")
_NEEDED = {"sh", "bwrap", "qemu-system-x86_64"}
"""Guardian, jail and VM: what a kernel consists of on the host, beside the supervisor."""

Process = tuple[int, float, str]
"""Id, time of birth and name; an id alone may be somebody else's meanwhile."""

pytestmark = pytest.mark.timeout(600 + _SECONDS_EACH * CYCLES)

CLIENT = textwrap.dedent(
    """
    import gc, json, os, sys
    import psutil
    from jupyter_client import KernelManager

    for line in sys.stdin:
        os.environ["XDG_RUNTIME_DIR"], now = json.loads(line)
        km = KernelManager(kernel_name="python3-microvm")
        km.start_kernel()
        client = km.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=90)
        said = []
        client.execute_interactive("6 * 7", timeout=90, output_hook=said.append, allow_stdin=False)
        results = [m["content"]["data"]["text/plain"] for m in said if m["msg_type"] == "execute_result"]
        top = psutil.Process(km.provisioner.pid)
        family = [(p.pid, p.create_time(), p.name()) for p in [top, *top.children(recursive=True)]]
        told = {"vm": km.provisioner._vm_id(), "start": km.provisioner.report["start"]}
        told |= {"results": results, "family": family}
        client.stop_channels()
        km.shutdown_kernel(now=now)
        gc.collect()  # Jupyter's objects refer to each other; Python would do this at some later cycle
        print(json.dumps(told), flush=True)
    """
)


@dataclass
class Watched:
    """A process over the cycles.

    Attributes:
        process: it.
        memory: MiB of resident memory after each cycle.
        files: open files after each cycle.
    """

    process: psutil.Process
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self) -> None:
        self.memory.append(self.process.memory_info().rss / (1 << 20))
        least = self.process.num_fds()
        for _ in range(_LOOKS):  # a service that has just answered closes the connection a moment later
            time.sleep(0.01)
            least = min(least, self.process.num_fds())
        self.files.append(least)

    def windows(self) -> tuple[float, float]:
        """Medians of the memory in an early and in the last tenth of the cycles."""
        tenth = max(2, len(self.memory) // 10)
        return statistics.median(self.memory[tenth : 2 * tenth]), statistics.median(self.memory[-tenth:])


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """A place for logs, and a runtime directory for each way to start; a pool runs only in one of them."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("SANDBOX_KERNEL_START", "auto")
    with pool.no_pool() as restored, pool.no_pool() as pooled:
        yield {"restored": restored, "pooled": pooled, "logs": tmp_path}


@contextmanager
def client() -> Iterator[subprocess.Popen[str]]:
    """A client that runs a cycle for each line it is sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(READY) == 0
    finally:
        process.kill()
        process.wait()


def cycle(process: subprocess.Popen[str], folder: Path, now: bool) -> dict[str, Any]:
    """One kernel from start to end; what the client tells of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(folder), now]) + "\n")
    process.stdin.flush()
    told: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
    return told


def test_nothing_is_left_of_many_cycles_and_nothing_grows(
    installed: None, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    host.ensure(VMSpec(), Silent())
    mounts, cgroups, kept = _mounts(), _cgroups(), _kept()
    vms: set[str] = set()
    born: set[Process] = set()

    def left() -> list[str]:
        return _left(born, vms, folders, cgroups)

    with pool.running(KERNEL) as service, client() as process:
        told = service.until_ready()
        watched = {
            "pool service": Watched(psutil.Process(service.process.pid)),
            "zygote": Watched(psutil.Process(told["zygote"])),
            "client": Watched(psutil.Process(process.pid)),
        }
        for number in range(CYCLES):
            way = _WAYS[number % 2]
            found = cycle(process, folders[way], now=number % 4 < 2)
            assert (found["start"], found["results"]) == (way, ["42"])
            family = {(pid, created, name) for pid, created, name in found["family"]}
            assert {name for *_, name in family} >= _NEEDED
            told = service.until_ready()
            vms |= {found["vm"], *(vm["id"] for vm in told["vms"])}
            born |= family
            for each in watched.values():
                each.look()
        children = watched["client"].process.children()
        born |= {(p.pid, p.create_time(), p.name()) for p in children}
        (waiting,) = map(psutil.Process, [vm["pid"] for vm in told["vms"]])
        born |= {(p.pid, p.create_time(), p.name()) for p in (waiting, *waiting.children(recursive=True))}
        seen = " ".join(left())  # what waits in the pool is to be gone soon; it would be seen otherwise
        failed = _kept_logs(folders["logs"] / "sandbox-kernel" / "vms")
    with capsys.disabled():
        print("\n" + "\n".join(_table(watched)))
    assert told["given"] == CYCLES // 2
    assert len(children) <= 1, children  # its zygote
    assert [word for word in (*_NEEDED, str(folders["pooled"])) if word not in seen] == []
    assert not failed, "\n".join(failed)
    assert until(lambda: not left(), GONE), left()
    assert _mounts() == mounts
    assert _kept() == kept
    for name, each in watched.items():
        # A client gets its zygote during its first cycles; for its next kernel a VM may wait, or not.
        assert each.files[-1] <= max(each.files[:_FIRST]) + _OF_A_WAITING_VM, (
            f"{name}: open files {each.files}"
        )
        early, late = each.windows()
        assert CYCLES < LONG or late <= early * (1 + GROWTH) + NOISE, f"{name}: {early:.1f} to {late:.1f} MiB"


def _table(watched: dict[str, Watched]) -> list[str]:
    lines = [f"{CYCLES} cycles; resident memory in an early and in the last tenth of them; open files"]
    for name, each in watched.items():
        early, late = each.windows()
        files = f"{max(each.files[:_FIRST])} → {each.files[-1]}"
        lines.append(f"{name:>12}: {early:6.1f} → {late:6.1f} MiB ({late - early:+.2f}), {files}")
    return lines


def _left(born: set[Process], vms: set[str], folders: dict[str, Path], cgroups: set[Path]) -> list[str]:
    """What is left of these VMs: processes, anything in the folders, cgroups that nobody is in."""
    words = {*vms, *(str(folder) for folder in folders.values())}
    found = [f"process {pid} {name}" for pid, created, name in born if _lives(pid, created)]
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            text = " ".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue  # of another user, or gone
        if any(word in text for word in words):
            found.append(f"process {process.pid} {process.name()}")
    for name in _WAYS:
        found += [str(path) for path in folders[name].glob("*/*")]
    found += [str(path) for path in folders["logs"].glob("sandbox-kernel/vms/*")]
    for folder in _cgroups() - cgroups:  # somebody else's VM may be running on this machine
        if any(vm in folder.name for vm in vms) or not (folder / "cgroup.procs").read_text():
            found.append(str(folder))
    return found


def _kept_logs(folder: Path) -> list[str]:
    """What the logs of VMs say that have ended: those are kept only when something went wrong."""
    ended = [path for path in folder.iterdir() if not Path("/proc", path.name.rpartition("-")[2]).exists()]
    return [f"{path.name}:\n{(path / 'supervisor.log').read_text()}" for path in ended]


def _lives(pid: int, created: float) -> bool:
    try:
        return psutil.Process(pid).create_time() == created
    except psutil.NoSuchProcess:
        return False


def _cgroups() -> set[Path]:
    return {*CGROUPS.glob(f"{PREFIX}*"), *CGROUPS.glob(f"*/{PREFIX}*")}


def _mounts() -> set[str]:
    """Where file systems are mounted, for this process (proc(5), mountinfo)."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _kept() -> dict[str, int]:
    """Everything in the places for templates, images and what can be found out again: its bytes on disk.

    In tmpfs its size: there, who reads a hole through a mapping fills it.
    """
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    in_memory = {words[2] for words in mounts if words[words.index("-") + 1] == "tmpfs"}
    kept = {}
    for path in (path for folder in (data_dir(), cache_dir()) for path in folder.rglob("*")):
        found = path.lstat()
        device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
        kept[str(path)] = found.st_size if device in in_memory else found.st_blocks * 512
    return kept
