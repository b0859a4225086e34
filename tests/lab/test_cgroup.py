"""In the lab only: cgroup v2, of which an ordinary user has been given a part."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_kernel.jail.cgroup import OVERHEAD, PREFIX
from tests.microvm import READY, Kernel, microvm, until

DELEGATED = Path("/sys/fs/cgroup/user")
"""The part that is the user's (guest/init.py)."""


def group_of(kernel: Kernel) -> Path:
    return DELEGATED / f"{PREFIX}{kernel.manager.provisioner._vm_id()}"


def test_qemu_lives_in_a_group_with_bounds(installed: None) -> None:
    with microvm(memory=512) as kernel:
        group = group_of(kernel)
        assert int((group / "memory.max").read_text()) == (512 + OVERHEAD) << 20
        pids = [int(line) for line in (group / "cgroup.procs").read_text().split()]
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
        assert any(name.startswith("qemu-system") for name in names)
        assert kernel.supervisor.pid not in pids
    assert until(lambda: not group.exists(), 2.0)


def test_a_vm_that_outgrows_its_group_says_so_in_the_running_cell(installed: None) -> None:
    with microvm() as kernel:
        request = kernel.client.execute("x = []\nwhile True: x.append(bytearray(1 << 20))", allow_stdin=False)
        (group_of(kernel) / "memory.max").write_text(str(128 << 20))
        reply = kernel.reply_to(request, READY)
        assert reply["content"]["status"] == "error"
        assert "its host cgroup ran out of memory" in reply["content"]["evalue"]


@pytest.mark.parametrize("start", ["cold", "auto"])
def test_nothing_is_left_of_a_group(installed: None, start: str) -> None:
    with microvm(start=start) as kernel:
        group = group_of(kernel)
        assert group.is_dir()
        kernel.supervisor.kill()
        assert until(lambda: not group.exists(), 2.0)
