"""A VM's group on the host: how a process gets into it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.jail import cgroup
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.jail.parent import ParentThread


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A group of this host's."""
    made = cgroup.create(f"unit-{os.getpid()}", 64, 1)
    if made.missing:
        pytest.skip(made.missing)
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
    assert not Cgroup((), "there is none").join()


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
