"""A VM's group on the host: how a process gets into it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.jail import cgroup
from sandbox_kernel.jail.cgroup import OVERHEAD, PROCESSES, Bounds, Cgroup
from sandbox_kernel.jail.parent import ParentThread
from sandbox_kernel.supervisor.belongings import unenforced


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A group of this host's."""
    made = cgroup.create(f"unit-{os.getpid()}", Bounds(64, 1, 0.5))
    if made.missing:
        pytest.skip(str(made.missing))
    yield made
    for folder in made.folders:
        folder.rmdir()


def test_a_thread_joins_where_there_are_groups_of_threads(tmp_path: Path) -> None:
    (tmp_path / "tasks").touch()
    assert Cgroup((tmp_path,)).join()
    assert (tmp_path / "tasks").read_text() == "0"


def test_nobody_joins_a_group_of_whole_processes(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    assert not Cgroup((tmp_path,)).join()
    assert (tmp_path / "cgroup.procs").read_text() == ""


def test_where_there_is_no_group_nobody_joins() -> None:
    assert not Cgroup((), {"memory": "there is none"}).join()


def test_a_child_is_born_in_the_group_of_the_thread_that_started_it(group: Cgroup) -> None:
    if not (group.folders[0] / "tasks").exists():
        pytest.skip("cgroup v2 has no groups of threads")
    here = Path("/proc/thread-self/cgroup").read_text()
    parent = ParentThread()

    def start() -> str:
        assert group.join()
        return subprocess.run(["cat", "/proc/self/cgroup"], capture_output=True, text=True).stdout

    said = parent.run(start)
    assert all(f":/{folder.name}\n" in said for folder in group.folders)
    assert Path("/proc/thread-self/cgroup").read_text() == here
    parent.close()
    while any(thread.name == "parent-of-qemu" for thread in threading.enumerate()):
        threading.Event().wait(0.01)


def test_a_group_has_the_bounds_that_it_was_made_with(group: Cgroup) -> None:
    def first(*names: str) -> str:
        files = [folder / name for folder in group.folders for name in names]
        return next(file.read_text().strip() for file in files if file.exists())

    assert int(first("memory.max", "memory.limit_in_bytes")) == (64 + OVERHEAD) << 20
    assert int(first("pids.max")) == PROCESSES + 4
    assert first("cpu.max", "cpu.cfs_quota_us").split()[0] == "50000"


def made_of(root: Path, *controllers: str) -> Path:
    """A folder that looks like the mount points of cgroup v1."""
    for controller in controllers:
        (root / controller).mkdir()
        (root / controller / "cgroup.procs").touch()
    return root


def test_what_cannot_be_had_is_named_and_the_rest_is_had(tmp_path: Path) -> None:
    group = cgroup.create("x", Bounds(64, 1, 0.5), made_of(tmp_path, "memory", "cpu"))
    assert [folder.parent.name for folder in group.folders] == ["memory", "cpu"]
    assert group.missing == {"pids": f"not mounted at {tmp_path}/pids"}


def test_a_controller_that_nobody_wants_is_not_missed(tmp_path: Path) -> None:
    group = cgroup.create("x", Bounds(64, 1), made_of(tmp_path, "memory", "pids"))
    assert group.missing == {}
    assert len(group.folders) == 2


def test_what_is_not_enforced_is_told_in_the_users_words() -> None:
    assert unenforced({"cpu": "not delegated to /x"}) == "`cpu_quota` is not bounded (not delegated to /x)"
