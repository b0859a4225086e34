"""Everything that is required, checked at once: the table that `doctor` prints and `setup` works through.

Checks are independent of each other and mostly wait for a program to tell its version, so they run in
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sandbox_kernel.errors import HostError
from sandbox_kernel.host import facilities, kernelspec, programs
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.machine import accelerator

_WORKERS = 8


def check_host() -> list[Finding]:
    """What `setup` must find before it can build an image: programs and facilities."""
    return _together(
        [
            facilities.processor,
            *(partial(programs.check, program) for program in programs.PROGRAMS),
            facilities.keyring,
            facilities.user_namespaces,
            facilities.subordinate_ids,
            facilities.vhost_vsock,
            facilities.tap,
            facilities.control_group,
            facilities.disk,
            facilities.memory,
        ]
    )


def check_everything() -> list[Finding]:
    """All of the above, and what `setup` adds: image, accelerator's verdict, kernelspec."""
    return [*check_host(), default_image(), kvm(), kernelspec.check()]


def default_image() -> Finding:
    """The image that a kernel gets when nothing else is configured."""
    name = "image default"
    try:
        image = ImageStore().open()
    except HostError as error:
        return Finding(name, False, True, str(error), "run `sandbox-kernel image build`")
    size = image.manifest.size() / 1e6
    return Finding(name, True, True, f"{image.digest[:12]}, {size:.0f} MB, built {image.manifest.created}")


def kvm() -> Finding:
    """Whether KVM has been seen to work; never boots anything itself."""
    name = "KVM (ten times faster)"
    missing = accelerator.unavailable()
    if missing:
        fix = "allow the user to open it (group kvm), or go on with software emulation"
        return Finding(name, False, False, missing, fix)
    try:
        verdict = accelerator.cached(ImageStore().open())
    except HostError:
        return Finding(
            name, False, False, "not probed: the image or QEMU is missing", "run `sandbox-kernel setup`"
        )
    if verdict is None:
        return Finding(name, False, False, "not probed yet", "run `sandbox-kernel doctor --probe`")
    fix = "" if verdict.usable else "nothing to do: software emulation is used; --probe tries again"
    return Finding(name, verdict.usable, False, verdict.reason, fix)


def _together(checks: list[Callable[[], Finding]]) -> list[Finding]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(lambda check: check(), checks))
