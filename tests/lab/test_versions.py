"""In the lab only: each guest that the lab has (tests/lab/guests.py), with the lab's own QEMU."""

from __future__ import annotations

import re
import subprocess

import pytest

from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.machine import accelerator
from sandbox_kernel.spec import VMSpec
from tests.lab.guests import GUESTS
from tests.microvm import microvm


@pytest.mark.parametrize("guest", GUESTS)
def test_a_guest_boots_makes_a_template_and_is_restored(installed: None, guest: str) -> None:
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"version (\S+)", said.stdout)
    assert version is not None
    made = template.ensure(VMSpec(image=guest), Silent())
    assert ".".join(map(str, made.qemu)) in version[1]
    verdict = accelerator.cached(ImageStore().open(guest))
    assert verdict is not None
    assert verdict.usable, verdict.reason
    for start in ("cold", "auto"):
        for vsock in ("kernel", "userspace"):
            with microvm(image=guest, start=start, vsock=vsock) as kernel:
                report = kernel.manager.provisioner.report
                assert report["start"] == ("cold" if start == "cold" else "restored")
                assert (report["accelerator"][0], report["vsock"][0]) == ("kvm", vsock)
                release = "print(open('/etc/os-release').read())"
                assert f"VERSION_CODENAME={GUESTS[guest]}" in kernel.run(release)
