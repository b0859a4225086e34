"""What a template must be for to be of use to a machine on this host."""

from __future__ import annotations

from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.machine.accelerator import INSTALL
from sandbox_kernel.qemu.command import EMULATED_CPU, KERNEL_ARGUMENTS, TRANSLATION_CACHE
from sandbox_kernel.template.key import TemplateKey, identify_cpu, identify_qemu


def key_of(
    image: Image, memory: int, vcpus: int, accelerator: str, modules: tuple[str, ...] = ()
) -> TemplateKey:
    """The key of a machine's template, with `modules` and those that the image names imported in it.

    Raises:
        MissingToolError: QEMU is not installed.
    """
    return TemplateKey(
        image.digest,
        memory,
        vcpus,
        accelerator,
        tuple(sorted({*modules, *image.manifest.preload})),
        identify_qemu(bubblewrap.find("qemu-system-x86_64", INSTALL)),
        identify_cpu(accelerator),
        " ".join((*KERNEL_ARGUMENTS, EMULATED_CPU, str(TRANSLATION_CACHE))),
    )
