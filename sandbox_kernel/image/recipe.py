"""What an image is made of, as data, and the digest by which an unchanged recipe is recognised.

Two digests: `digest` covers everything; `base_digest` leaves out our own programs, which change more often
than Debian and take a second to exchange in a finished image. The mirror, the package index and the host's
tools are no inputs. Versions are not inputs either unless the user pins them: a recipe says "numpy", the
manifest of what was built says which.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.image import modules
from sandbox_kernel.image.programs import Program

BUILDER = 2
"""Version of the build's own steps: a change of what they produce is a change of this number."""

DEBIAN_PACKAGES = (
    "python3",
    # HTTPS with verified certificates, once a VM is given a network.
    "ca-certificates",
    # `ps`, `top`, `free`, `pkill`: what `!` in a notebook is used for besides coreutils.
    "procps",
)
KERNEL_PACKAGES = ("linux-image-amd64", "busybox-static")
"""Taken apart, not installed: the guest's kernel, its modules, and the initramfs' only program."""
PRELOAD = "preload.json"
"""Name among the image's programs of the list of modules to preload."""
PYTHON_PACKAGES = ("ipykernel", "ipywidgets", "matplotlib", "numpy", "pandas", "psutil", "debugpy")


_REQUIREMENT = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s*(\[[^\]\n]*\])?\s*([<>=!~;@].*)?"


@dataclass(frozen=True)
class Recipe:
    """The inputs of one image.

    Attributes:
        suite: Debian release.
        debian_packages: installed beside the minimal system.
        kernel_packages: taken apart for kernel, modules and busybox.
        python_packages: requirement specifiers (PEP 508).
        programs: our own programs for the guest.
        initramfs: text of the initramfs' init.
        builder: version of the build's steps.
        preload: Python modules that are imported in the image's templates; written into the image, so that
            images that differ in them are different images.
        kernel_modules: modules of the guest's kernel that are loaded at boot.
    """

    programs: tuple[Program, ...]
    initramfs: str
    suite: str = "trixie"
    debian_packages: tuple[str, ...] = DEBIAN_PACKAGES
    kernel_packages: tuple[str, ...] = KERNEL_PACKAGES
    python_packages: tuple[str, ...] = PYTHON_PACKAGES
    builder: int = BUILDER
    preload: tuple[str, ...] = ()
    kernel_modules: tuple[str, ...] = modules.WANTED

    def with_packages(self, packages: tuple[str, ...]) -> Recipe:
        """The same recipe with more Python packages; each counts once, order does not matter."""
        extra = sorted(set(packages) - set(self.python_packages))
        return dataclasses.replace(self, python_packages=self.python_packages + tuple(extra))

    def with_preload(self, modules: tuple[str, ...]) -> Recipe:
        """The same recipe with modules to preload; order does not matter."""
        return dataclasses.replace(self, preload=tuple(sorted(set(modules))))

    def contents(self) -> tuple[Program, ...]:
        """What is put into the image's folder of programs."""
        if not self.preload:
            return self.programs
        return (*self.programs, Program(PRELOAD, json.dumps(self.preload).encode()))

    def inputs(self) -> dict[str, object]:
        """Everything that shapes the image, ready for JSON; programs by their hash."""
        return {
            **self._base(),
            "programs": {program.name: program.sha256 for program in self.contents()},
            **({"preload": list(self.preload)} if self.preload else {}),
            "initramfs": hashlib.sha256(self.initramfs.encode()).hexdigest(),
        }

    def digest(self) -> str:
        """sha256 over all inputs, in hexadecimal."""
        return _digest(self.inputs())

    def base_digest(self) -> str:
        """sha256 over all inputs but our own programs, in hexadecimal."""
        return _digest(self._base())

    def _base(self) -> dict[str, object]:
        return {
            "builder": self.builder,
            "suite": self.suite,
            "debian": sorted(self.debian_packages),
            "kernel": sorted(self.kernel_packages),
            "python": sorted(self.python_packages),
            # In their order: what a module needs without saying so is named before it.
            "modules": list(self.kernel_modules),
        }


def _digest(inputs: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def requirement(text: str) -> str:
    """One requirement as the user gave it on the command line, checked.

    Raises:
        ConfigurationError: it does not begin like a package's name (PEP 508), so it would be read as an
            option or a path on the host.
    """
    text = text.strip()
    if not re.fullmatch(_REQUIREMENT, text):
        raise ConfigurationError(
            f"{text!r} is no requirement on a package; write a name with an optional version such as "
            "`scipy` or `scipy==1.15.3`."
        )
    return text


def read_requirements(file: Path) -> tuple[str, ...]:
    """The requirements in a requirements file: one a line, comments and continuations allowed.

    Options and references to other files are refused: what they bring in would not be an input.

    Raises:
        ConfigurationError: the file cannot be read, or a line is no requirement.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The requirements file {file} cannot be read ({error}); name another."
        ) from error
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if line.startswith("-"):
            raise ConfigurationError(
                f"{file} has the line {line[:60]!r}; allowed are requirements, with hashes at "
                "most, no options and no other files."
            )
        if line:
            found.append(requirement(re.sub(r"\s+", " ", line)))
    return tuple(found)
