"""In the lab only: cgroup v2, of which an ordinary user has been given a part."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_kernel.jail.cgroup import OVERHEAD, PREFIX
from tests.microvm import READY, Kernel, microvm, until

DELEGATED = Path("/sys/fs/cgroup/user")
"""The part that is the user's (guest/init.py)."""


def group_of(kernel: Kernel) -> Path:
    """Named after the VM, which may have waited under another name than its kernel's."""
    [line] = Path(f"/proc/{kernel.qemu.pid}/cgroup").read_text().splitlines()
    group = Path("/sys/fs/cgroup", line.removeprefix("0::/"))
    assert group.parent == DELEGATED
    assert group.name.startswith(PREFIX)
    return group


def test_qemu_lives_in_a_group_with_bounds(installed: None) -> None:
    with microvm(memory=512) as kernel:
        group = group_of(kernel)
        assert int((group / "memory.max").read_text()) == (512 + OVERHEAD) << 20
        pids = [int(line) for line in (group / "cgroup.procs").read_text().split()]
        assert kernel.qemu.pid in pids
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
