"""Installs Debian packages, or says in one command how somebody who may do it does.

`apt-get update` runs first where its lists are missing, older than a week, or do not know a package. If an
installation fails with lists that were taken to be good (a mirror that has moved on), it is tried once more
with new ones.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from sandbox_kernel.errors import HostError, MissingToolError
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.image import tool

_LISTS = Path("/var/lib/apt/lists")
_WEEK = 7 * 86400
_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
_OPTIONS = ("-q", "-y", "-o", "DPkg::Lock::Timeout=300")


def missing_packages(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Packages that would mend what is needed and not there, each once."""
    return tuple(dict.fromkeys(name for found in findings if found.fatal for name in found.packages))


def install_command(packages: Sequence[str]) -> str:
    """What an administrator types to install them."""
    return shlex.join(["sudo", "apt-get", "install", "--no-install-recommends", *packages])


def require_permission(packages: Sequence[str]) -> None:
    """Refuses where this process cannot install packages.

    Raises:
        MissingToolError: it is not root, or the host is no Debian; with the command to run.
    """
    if not shutil.which("apt-get"):
        raise MissingToolError(
            f"Programs are missing, by their Debian packages {', '.join(packages)}; install them with this "
            "distribution's package manager and run `sandbox-kernel setup` again."
        )
    if os.geteuid() != 0:
        raise MissingToolError(
            f"Debian packages are missing; run `{install_command(packages)}`, then this again."
        )


def install(packages: Sequence[str]) -> None:
    """Installs packages as root.

    Raises:
        HostError: apt-get failed; the message ends with its own words.
    """
    fresh = lists_are_good(packages)
    if not fresh:
        update()
    try:
        _install(packages)
    except HostError:
        if not fresh:
            raise
        update()
        _install(packages)


def lists_are_good(packages: Sequence[str], lists: Path = _LISTS) -> bool:
    """Whether apt's lists are there, not too old, and know every package."""
    times = [file.stat().st_mtime for file in lists.glob("*InRelease")]
    if not times or time.time() - max(times) > _WEEK:
        return False
    policy = subprocess.run(
        ["apt-cache", "policy", *packages],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_ENVIRONMENT},
    )
    return policy.stdout.count("Candidate: ") - policy.stdout.count("Candidate: (none)") == len(packages)


def update() -> None:
    """Fetches apt's lists anew.

    Raises:
        HostError: a mirror cannot be reached.
    """
    tool.run(["apt-get", "update", *_OPTIONS], purpose="apt-get update", env={**os.environ, **_ENVIRONMENT})


def _install(packages: Sequence[str]) -> None:
    argv = ["apt-get", "install", "--no-install-recommends", *_OPTIONS, *packages]
    tool.run(argv, purpose="Installing Debian packages", env={**os.environ, **_ENVIRONMENT})
