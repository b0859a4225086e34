"""Puts the kernelspec where Jupyter looks for it, with the interpreter that has this package filled in.

The place is, as for ipykernel, the user's own data folder, or the environment's when there is one; a prefix
can be named. The interpreter is written out: a Jupyter server in another environment reads the same file,
and its `python` need not have sandbox-kernel.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from sandbox_kernel.errors import ConfigurationError, HostError
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.resources import kernelspecs_dir
from sandbox_kernel.spec import CAPS, ENVIRONMENT_PREFIX, VMSpec, from_environment, resolve

DEFAULT = "python3-microvm"
HERE = "python3-microvm-here"
"""The one whose kernels have the notebook's directory."""
_PROVISIONER = "microvm-provisioner"


@dataclass(frozen=True)
class Installation:
    """What to install and where.

    Attributes:
        name: the kernelspec's name.
        prefix: folder below which it goes (share/jupyter/kernels); None for the user's own data folder.
        image: guest image that its kernels run in; the default one when None.
        display_name: what frontends show; made from the image's name when None.
        like: `DEFAULT` or `HERE`: which of this package's kernelspecs it is a copy of.
    """

    name: str = DEFAULT
    prefix: str | None = None
    image: str | None = None
    display_name: str | None = None
    like: str = DEFAULT


def default_prefix() -> str | None:
    """The environment's prefix in a virtual environment; None, the user's own data folder, elsewhere."""
    return sys.prefix if sys.prefix != sys.base_prefix else None


def install(wanted: Installation) -> tuple[Path, bool]:
    """Installs a kernelspec unless it is there.

    Returns:
        Its folder, and whether anything was written.

    Raises:
        ConfigurationError: no kernelspec can have such a name.
        HostError: the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", wanted.name) or set(wanted.name) <= {"."}:
        raise ConfigurationError(
            f"{wanted.name!r} is no name for a kernelspec; allowed are letters, digits, `.`, `_`, `-`."
        )
    with tempfile.TemporaryDirectory(prefix="sandbox-kernel-") as scratch:
        source = Path(scratch) / "kernelspec"
        shutil.copytree(kernelspecs_dir() / wanted.like, source)
        (source / "kernel.json").write_text(fill_in((source / "kernel.json").read_text(), wanted))
        manager = KernelSpecManager()
        try:
            target = _folder(manager, wanted)
            if _same(source, target):
                return target, False
            user = wanted.prefix is None
            manager.install_kernel_spec(str(source), wanted.name, user=user, prefix=wanted.prefix)
            return target, True
        except OSError as error:
            raise HostError(
                f"The kernelspec cannot be written to {error.filename} ({error.strerror}); choose another "
                "place with --user or --prefix."
            ) from error


def fill_in(kernel_json: str, wanted: Installation) -> str:
    """The text of kernel.json with interpreter, image and display name in their places."""
    spec = json.loads(kernel_json)
    spec["argv"][0] = sys.executable
    spec["argv"] = [wanted.name if word == wanted.like else word for word in spec["argv"]]
    if wanted.image is not None:
        spec["metadata"]["kernel_provisioner"]["config"]["image"] = wanted.image
        folder = ", this folder" if wanted.like == HERE else ""
        spec["display_name"] = f"Python 3 (micro-VM, {wanted.image}{folder})"
    if wanted.display_name is not None:
        spec["display_name"] = wanted.display_name
    return json.dumps(spec, indent=2) + "\n"


def check() -> Finding:
    """Whether Jupyter, as run from this environment, finds the kernelspec and it is ours."""
    name = f"kernelspec {DEFAULT}"
    try:
        spec = KernelSpecManager().get_kernel_spec(DEFAULT)
    except NoSuchKernel:
        return Finding(name, False, True, "missing", "run `sandbox-kernel kernelspec install`")
    provisioner = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
    if provisioner != _PROVISIONER:
        return Finding(name, False, True, "is another program's", "run `sandbox-kernel kernelspec install`")
    return Finding(name, True, True, spec.resource_dir)


def _folder(manager: KernelSpecManager, wanted: Installation) -> Path:
    kernels = manager.user_kernel_dir if wanted.prefix is None else f"{wanted.prefix}/share/jupyter/kernels"
    # jupyter_client writes names in lower case.
    return Path(kernels) / wanted.name.lower()


def _same(source: Path, target: Path) -> bool:
    names = sorted(file.name for file in source.iterdir())
    if not target.is_dir() or sorted(file.name for file in target.iterdir()) != names:
        return False
    return not any(filecmp.cmpfiles(source, target, names, shallow=False)[1:])


def spec_of(kernelspec: str | None) -> VMSpec:
    """The VM that a kernelspec and the environment describe; the environment alone when None.

    Raises:
        ConfigurationError: there is no such kernelspec, or one of them asks for what is not allowed.
    """
    configured: dict[str, Any] = {}
    if kernelspec:
        try:
            metadata = KernelSpecManager().get_kernel_spec(kernelspec).metadata
        except NoSuchKernel as error:
            raise ConfigurationError(
                f"There is no kernelspec {kernelspec!r}; `jupyter kernelspec list` shows them."
            ) from error
        configured = metadata.get("kernel_provisioner", {}).get("config", {})
    return resolve(
        [
            (f"The kernelspec {kernelspec!r}", configured),
            (f"The environment ({ENVIRONMENT_PREFIX}…)", from_environment(os.environ)),
        ],
        from_environment(os.environ, tuple(CAPS)),
    )
