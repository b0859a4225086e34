"""What a spec comes to on this host: an image's content, accelerator and vsock, the template that fits."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.machine import accelerator
from sandbox_kernel.machine.ignition import choose_vsock
from sandbox_kernel.machine.key import key_of
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.key import TemplateKey


@dataclass(frozen=True)
class Decision:
    """Everything decided, nothing made yet.

    Attributes:
        spec: what was asked for.
        image: the guest image, verified.
        accelerator: `kvm` or `tcg`.
        vsock: `kernel` or `userspace`.
        why: reason for each of the two, as the end of a sentence.
        key: what a template must be for to fit; None when none is wanted.
    """

    spec: VMSpec
    image: Image
    accelerator: str
    vsock: str
    why: dict[str, str]
    key: TemplateKey | None


def decide_now(spec: VMSpec) -> Decision | None:
    """Decides for `spec`; None where nobody knows yet whether KVM works.

    Raises:
        HostError: the image or a tool is missing, or what was demanded is not available.
    """
    image = ImageStore().open(spec.image)
    settled = accelerator.settle(spec.accelerator, image)
    return None if settled is None else _with(spec, image, settled)


async def decide(spec: VMSpec) -> Decision:
    """Decides for `spec`; boots the guest's kernel under KVM where nobody knows yet whether that works.

    Raises:
        HostError: as `decide_now`.
    """
    decision = decide_now(spec)
    if decision is None:
        from sandbox_kernel.machine import probe

        image = ImageStore().open(spec.image)
        decision = _with(spec, image, await probe.choose(spec.accelerator, image))
    return decision


def _with(spec: VMSpec, image: Image, settled: tuple[str, str]) -> Decision:
    """The decision, with the accelerator and the reason for it."""
    chosen, why_accelerator = settled
    vsock, why_vsock = choose_vsock(spec.vsock)
    key = key_of(image, chosen, spec) if spec.start == "auto" else None
    why = {"accelerator": why_accelerator, "vsock": why_vsock}
    return Decision(spec, image, chosen, vsock, why, key)
