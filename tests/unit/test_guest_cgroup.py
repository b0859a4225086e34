"""What the agent reads from and writes to its cgroups; folders with the kernel's files stand in for them."""

from __future__ import annotations

from pathlib import Path

import pytest

import cgroup
from settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    kernel = tmp_path / "kernel"
    kernel.mkdir()
    for name in ("memory.max", "pids.max"):
        (kernel / name).write_text("max\n")
    (kernel / "memory.current").write_text("0\n")
    (kernel / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n")
    return Settings(cgroups=str(tmp_path))


def test_kills_for_want_of_memory_are_counted(settings: Settings) -> None:
    assert cgroup.out_of_memory_kills(settings) == 2
    assert cgroup.out_of_memory_kills(Settings(cgroups="/no/such")) == 0
    assert cgroup.out_of_memory_kills(Settings(cgroups="")) == 0


def test_a_number_is_one_or_there_is_no_limit(settings: Settings) -> None:
    assert cgroup.number(settings, "memory.max") == 0
    assert cgroup.number(settings, "no.such.file") == 0
    Path(settings.kernel_cgroup, "memory.max").write_text("4096\n")
    assert cgroup.number(settings, "memory.max") == 4096


def test_the_kernel_gets_the_available_memory_but_the_reserve_and_half_of_it_at_least(
    settings: Settings,
) -> None:
    limit = Path(settings.kernel_cgroup, "memory.max")
    cgroup.limit_memory(settings, 1 << 62)
    half = int(limit.read_text())
    assert half > 0
    Path(settings.kernel_cgroup, "memory.current").write_text(str(1 << 50))
    cgroup.limit_memory(settings, 1 << 20)
    assert int(limit.read_text()) > (1 << 50) - (1 << 20)


def test_settings_are_not_changed() -> None:
    with pytest.raises(AttributeError, match="not changed"):
        Settings().uid = 0
