"""What a template must be for to be of use to a machine on this host."""

from __future__ import annotations

from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.machine.accelerator import INSTALL
from sandbox_kernel.qemu.command import EMULATED_CPU, KERNEL_ARGUMENTS, TRANSLATION_CACHE, nic_device
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.key import TemplateKey, identify_cpu, identify_qemu


def key_of(image: Image, accelerator: str, spec: VMSpec) -> TemplateKey:
    """The key of the template that a machine of this image and accelerator needs for `spec`.

    Raises:
        MissingToolError: QEMU is not installed.
    """
    return TemplateKey(
        image.digest,
        spec.memory,
        spec.vcpus,
        accelerator,
        tuple(sorted({*spec.preload, *image.manifest.preload})),
        spec.network != "none",
        identify_qemu(bubblewrap.find("qemu-system-x86_64", INSTALL)),
        identify_cpu(accelerator),
        " ".join((*KERNEL_ARGUMENTS, EMULATED_CPU, str(TRANSLATION_CACHE), str(nic_device("")))),
    )
