"""The Python part of an image, by uv, from outside: a guest's root has no network and no certificates.

uv resolves for the guest's Python and C library, whatever Python it runs under, and takes wheels only: a
source distribution would run its build script here, on the host, outside of any sandbox.

uv does not read pip's configuration. Where uv has none of its own and pip has (a company's index, a folder
of wheels), pip's is handed on, so that `pip install sandbox-kernel` working means that this works.

`--target` puts scripts and data beside the modules; they are moved to where an installation under
/usr/local has them, and scripts get the guest's interpreter.
"""

from __future__ import annotations

import email.parser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import uv

from sandbox_kernel.errors import ImageError, MissingToolError
from sandbox_kernel.image import system, tool

NEWEST = (2, 40)
"""Version of glibc in the newest platform's name that uv knows; Debian 13 has 2.41."""

_NOT_NEEDED = (
    "dist/share/jupyter/labextensions",  # the frontend's half of widgets is served by the host
    "dist/share/jupyter/nbextensions",
    "dist/widgetsnbextension/static",
    "dist/etc/jupyter",
    "dist/pandas/tests",
    "dist/matplotlib/tests",
    "dist/mpl_toolkits/*/tests",
    "dist/numpy/tests",
    "dist/numpy/*/tests",
    "dist/tornado/test",
    "dist/ipywidgets/tests",
    "dist/ipywidgets/widgets/tests",
)
"""Measured: 43 of 70 MB are pandas' tests; nothing outside of these folders imports them."""


def python_version(root: Path) -> str:
    """The guest's Python, such as `3.13`, read off the root's /usr/bin/python3.

    Raises:
        ImageError: there is none.
    """
    link = root / "usr/bin/python3"
    match = re.fullmatch(r"python(3\.\d+)", str(link.readlink())) if link.is_symlink() else None
    if match is None:
        raise ImageError(
            "The guest's root has no /usr/bin/python3; the recipe must include the package python3."
        )
    return match[1]


def platform(root: Path) -> str:
    """uv's name for systems like this root: what runs with its C library, by dpkg's version of that.

    Raises:
        ImageError: there is none.
    """
    match = re.match(r"(\d+)\.(\d+)", system.packages(root).get("libc6", ""))
    if match is None:
        raise ImageError("The guest's root has no C library (libc6); the recipe must be one of Debian.")
    major, minor = min(NEWEST, (int(match[1]), int(match[2])))
    return f"x86_64-manylinux_{major}_{minor}"


def site(root: Path) -> Path:
    """Folder of the guest's own Python packages, which Debian's Python finds by itself."""
    return root / "usr/local/lib" / f"python{python_version(root)}" / "dist-packages"


def install(root: Path, requirements: Sequence[str], scratch: Path) -> None:
    """Installs requirements into the guest's root.

    Args:
        root: the guest's root.
        requirements: PEP 508 specifiers, each maybe with `--hash` options.
        scratch: folder for temporary files.

    Raises:
        ImageError: a package cannot be had as a wheel for the guest, or versions conflict.
    """
    target = site(root)
    file = scratch / "requirements.txt"
    file.write_text("".join(f"{line}\n" for line in requirements))
    tool.run(
        [
            *(_uv(), "pip", "install", "--quiet", "--no-progress", "--requirement", file, "--target", target),
            *("--python", sys.executable, "--python-version", python_version(root)),
            *("--python-platform", platform(root), "--only-binary", ":all:", "--link-mode", "copy"),
        ],
        purpose="Installing Python packages",
        env={**_index(os.environ), **os.environ},
    )
    for pattern in _NOT_NEEDED:
        for folder in target.glob(pattern.removeprefix("dist/")):
            shutil.rmtree(folder)
    _move_out(target, root / "usr/local")


def versions(root: Path) -> dict[str, str]:
    """Installed Python packages and their versions, from their metadata."""
    found = {}
    for file in site(root).glob("*.dist-info/METADATA"):
        fields = email.parser.HeaderParser().parsestr(file.read_text(errors="replace"))
        found[str(fields["Name"])] = str(fields["Version"])
    return dict(sorted(found.items()))


def _uv() -> Path:
    try:
        return Path(uv.find_uv_bin())
    except FileNotFoundError as error:
        raise MissingToolError("The program uv is missing; run `pip install uv`.") from error


def _move_out(target: Path, prefix: Path) -> None:
    scripts = target / "bin"
    if scripts.is_dir():
        (prefix / "bin").mkdir(parents=True, exist_ok=True)
        for script in sorted(scripts.iterdir()):
            content = script.read_bytes()
            if content.startswith(b"#!") and b"python" in content.split(b"\n", 1)[0]:
                content = b"#!/usr/bin/python3\n" + content.split(b"\n", 1)[1]
                script.write_bytes(content)
            script.replace(prefix / "bin" / script.name)
        scripts.rmdir()
    for name in ("share", "etc", "include"):
        if (target / name).is_dir() and not (target / name / "__init__.py").exists():
            shutil.copytree(target / name, prefix / name, dirs_exist_ok=True)
            shutil.rmtree(target / name)
    (target / ".lock").unlink(missing_ok=True)


_PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
}


def _index(environ: Mapping[str, str]) -> dict[str, str]:
    """pip's index configuration as uv's environment; empty where uv has its own."""
    if any(
        name in environ
        for name in (*_PIP_TO_UV.values(), "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_CONFIG_FILE")
    ):
        return {}
    home = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    if any((folder / "uv/uv.toml").exists() for folder in (home, Path("/etc"))):
        return {}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return from_pip(listed.stdout if listed.returncode == 0 else "")


def from_pip(listing: str) -> dict[str, str]:
    """uv's environment for what `pip config list` prints; a variable wins over a file, as in pip."""
    found: dict[str, str] = {}
    rank: dict[str, int] = {}
    for section, key, value in re.findall(r"^(\S+?)\.([a-z-]+)='(.*)'$", listing, re.MULTILINE):
        name = _PIP_TO_UV.get(key)
        order = {"global": 1, "install": 2, ":env:": 3}.get(section, 0)
        if name and order > rank.get(name, 0):
            words = value.replace("\\n", " ").split()
            separator = "," if name == "UV_FIND_LINKS" else " "
            found[name], rank[name] = separator.join(words), order
    if "UV_INDEX" in found:
        # pip takes the best version of all indexes; uv by itself stops at the first that has the name.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found
