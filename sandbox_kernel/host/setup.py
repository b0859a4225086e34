"""Brings this host from nothing to a kernel that can be picked in Jupyter; does only what is missing.

    host           programs and facilities; Debian packages are installed if this is root
    image          the default image is built, or found unchanged
    accelerator    KVM is probed, unless that has been done for this host, QEMU and guest kernel
    template       a kernel of the default size is started once, for others to be restored from
    kernelspec     installed where Jupyter of this environment looks

Each part leaves things so that a second run finds it done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.host import debian, kernelspec, requirements, template
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.progress import Progress
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.machine import accelerator
from sandbox_kernel.machine.probe import probe as probe_kvm


@dataclass(frozen=True)
class Outcome:
    """What is there now: image, accelerator with the reason for it, kernelspec's folder."""

    image: Image
    accelerator: str
    reason: str
    kernelspec: Path


def run(progress: Progress, mirror: str | None = None, prefix: str | None = None) -> Outcome:
    """Does all that is missing.

    Args:
        progress: who is told.
        mirror: Debian mirror for the image; the host's own when None.
        prefix: where the kernelspec goes; None for the user's own data folder.

    Raises:
        HostError: something is missing that this process cannot get; the message says how to.
    """
    with progress.step("looking at this host"):
        findings = requirements.check_host()
    packages = debian.missing_packages(findings)
    if packages:
        debian.require_permission(packages)
        with progress.step(f"installing {', '.join(packages)}"):
            debian.install(packages)
        findings = requirements.check_host()
    _require(findings)
    store = ImageStore()
    order = Order(default_recipe(), mirror=mirror)
    if store.built_from(order.recipe.digest()) is None:
        progress.note("Building the default image; this is done once.")
    image, _ = build(order, store, progress)
    chosen, reason = _choose_accelerator(image, progress)
    template.offer(order.name, progress)
    folder, _ = kernelspec.install(kernelspec.Installation(prefix=prefix))
    kernelspec.install(kernelspec.Installation(kernelspec.HERE, prefix, like=kernelspec.HERE))
    return Outcome(image, chosen, reason, folder)


def probe(image: Image, progress: Progress) -> accelerator.Verdict:
    """Boots the guest's kernel under KVM, whatever is known already."""
    with progress.step("booting the guest's kernel under KVM"):
        return probe_kvm(image)


def _choose_accelerator(image: Image, progress: Progress) -> tuple[str, str]:
    missing = accelerator.unavailable()
    if missing:
        return "tcg", missing
    verdict = accelerator.cached(image) or probe(image, progress)
    return ("kvm" if verdict.usable else "tcg"), verdict.reason


def _require(findings: list[Finding]) -> None:
    for found in findings:
        if found.fatal:
            raise HostError(f"{found.name} is not to be had here ({found.found}); {found.fix}.")
