"""In the lab only: hardware acceleration and the kernel's vsock, as most users have them."""

from __future__ import annotations

import errno
import fcntl
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.machine import accelerator
from sandbox_kernel.vsock import reservation
from tests.microvm import READY, Kernel, microvm, until

NEIGHBOURS_CID = Path("/run/neighbour/cid")
"""The CID that another user of this machine holds as long as the lab runs (guest/init.py)."""
CID = """
import json, os, socket
found = set()
for name in os.listdir("/proc/self/fd"):
    try:
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family == socket.AF_VSOCK and connection.getpeername():
                found.add(connection.getsockname()[0])
    except OSError:
        pass
print(json.dumps(sorted(found)))
"""
"""For a cell: the guest's own address on each of the kernel's connections to the host."""
GONE = 2.0
"""Seconds within which everything of a killed kernel must be gone (SPECIFICATION.md, 'Clean-up')."""


@pytest.fixture(scope="module")
def restored(installed: None) -> Iterator[Kernel]:
    with microvm() as kernel:
        yield kernel


def how(kernel: Kernel) -> tuple[str, str, str]:
    report = kernel.manager.provisioner.report
    return report["start"], report["accelerator"][0], report["vsock"][0]


def cid_of(kernel: Kernel) -> int:
    [cid] = json.loads(kernel.run(CID))
    return int(cid)


def claim(cid: int) -> int | None:
    """The error with which Linux refuses a CID; None when it is free."""
    with reservation.DEVICE.open("r+b", buffering=0) as device:
        try:
            fcntl.ioctl(device, reservation._SET_GUEST_CID, cid.to_bytes(8, "little"))
        except OSError as error:
            return error.errno
    return None


def test_the_probe_has_booted_the_guests_kernel_under_kvm(installed: None) -> None:
    verdict = accelerator.cached(ImageStore().open())
    assert verdict is not None
    assert verdict.usable, verdict.reason


def test_a_kernel_boots_under_kvm_with_the_kernels_vsock(installed: None) -> None:
    with microvm(start="cold") as kernel:
        assert how(kernel) == ("cold", "kvm", "kernel")
        assert kernel.run("6 * 7") == "42"


def test_a_kernel_is_restored_under_kvm_with_the_kernels_vsock(restored: Kernel) -> None:
    assert how(restored) == ("restored", "kvm", "kernel")
    assert restored.run("6 * 7") == "42"
    opened = {str(file.readlink()) for file in Path(f"/proc/{restored.qemu.pid}/fd").iterdir()}
    assert {"/dev/kvm", "/dev/vhost-vsock"} <= opened


def test_two_clones_have_a_cid_each_that_the_template_had_not(restored: Kernel) -> None:
    with microvm() as other:
        assert how(other) == ("restored", "kvm", "kernel")
        cids = {cid_of(restored), cid_of(other)}
        assert len(cids) == 2
        assert [claim(cid) for cid in cids] == [errno.EADDRINUSE, errno.EADDRINUSE]


def test_a_taken_cid_is_passed_over_whoever_has_it(restored: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = int(NEIGHBOURS_CID.read_text())
    assert claim(neighbours) == errno.EADDRINUSE
    free = random.randint(1 << 20, 1 << 30)
    offers = iter([cid_of(restored), neighbours, free])
    monkeypatch.setattr(reservation.random.SystemRandom, "randint", lambda *_: next(offers))
    device, cid = reservation.reserve_cid()
    with device:
        assert cid == free
        assert claim(free) == errno.EADDRINUSE


@pytest.mark.parametrize("victim", ["supervisor", "qemu"])
def test_a_killed_vms_cid_is_free_again(installed: None, victim: str) -> None:
    with microvm() as kernel:
        cid = cid_of(kernel)
        assert claim(cid) == errno.EADDRINUSE
        (kernel.supervisor if victim == "supervisor" else kernel.qemu).kill()
        assert until(lambda: claim(cid) is None, GONE)


def test_the_two_vsocks_live_side_by_side(restored: Kernel) -> None:
    with microvm(vsock="userspace") as other:
        assert how(other) == ("restored", "kvm", "userspace")
        assert other.run("6 * 7") == restored.run("6 * 7") == "42"
        megabytes = "print('x' * 4_000_000)"
        assert len(other.run(megabytes)) == len(restored.run(megabytes)) == 4_000_000


def test_many_kernels_at_once_are_all_restored(installed: None) -> None:
    with ExitStack() as stack:
        kernels = [stack.enter_context(microvm()) for _ in range(4)]
        assert {how(kernel) for kernel in kernels} == {("restored", "kvm", "kernel")}
        assert len({cid_of(kernel) for kernel in kernels}) == 4


def test_a_restart_gets_another_vm_with_another_cid(installed: None) -> None:
    with microvm() as kernel:
        before = cid_of(kernel)
        kernel.manager.restart_kernel()
        kernel.client.wait_for_ready(timeout=READY)
        assert how(kernel) == ("restored", "kvm", "kernel")
        assert cid_of(kernel) != before
        assert claim(before) is None
