"""The programs that this package runs, the oldest version that will do, and the Debian package of each.

busybox and kmod are not among them: the initramfs' busybox is the guest's own, and the order of modules is
read from the modules.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from sandbox_kernel.host.finding import Finding

_SYSTEM = "/usr/sbin:/sbin:/usr/local/sbin"
_PATIENCE = 20.0
"""Seconds for a program to tell its version; QEMU on a cold, busy machine takes several."""


@dataclass(frozen=True)
class Program:
    """A program that must be installed.

    Attributes:
        name: of its file.
        package: Debian package that brings it.
        purpose: what it is for, a few words.
        minimum: oldest version that will do; empty when any will.
        ask: arguments that make it tell its version; empty when it cannot.
        user_only: not needed by root.
    """

    name: str
    package: str
    purpose: str
    minimum: tuple[int, ...] = ()
    ask: tuple[str, ...] = ("--version",)
    user_only: bool = False


PROGRAMS = (
    Program("qemu-system-x86_64", "qemu-system-x86", "runs the VMs", minimum=(7, 2)),
    Program("bwrap", "bubblewrap", "jails QEMU", minimum=(0, 8)),
    Program("mmdebstrap", "mmdebstrap", "installs the guest's Debian", minimum=(1, 2)),
    Program("mkfs.erofs", "erofs-utils", "packs the guest's root", minimum=(1, 5), ask=("-V",)),
    Program("fsck.erofs", "erofs-utils", "unpacks the guest's root", minimum=(1, 5), ask=("-V",)),
    Program("zstd", "zstd", "unpacks the guest's kernel"),
    Program("mke2fs", "e2fsprogs", "makes scratch disks and volumes", ask=("-V",)),
    Program("diod", "diod", "serves mounted directories", ask=()),
    Program("nft", "nftables", "filters networks", ask=()),  # tells no version where Linux has no nftables
    Program("dnsmasq", "dnsmasq-base", "resolves names by policy", minimum=(2, 87)),
    Program("slirp4netns", "slirp4netns", "connects networks to the host's", minimum=(1, 2)),
    Program("unshare", "util-linux", "makes network namespaces"),
    Program("tar", "tar", "unpacks the guest's Debian"),
    Program("setpriv", "util-linux", "ends tools with their caller"),
    Program("newuidmap", "uidmap", "lets a user build images", ask=(), user_only=True),
)


def check(program: Program, path: str | None = None, root: bool | None = None) -> Finding:
    """Looks for one program and asks for its version.

    Args:
        program: which.
        path: search path; the environment's and the folders of system programs when None.
        root: whether it is root who asks; the truth when None.
    """
    needed = not (program.user_only and (os.getuid() == 0 if root is None else root))
    fix = f"install the package {program.package}"
    title = f"{program.name} ({program.purpose})"
    file = shutil.which(program.name, path=path)
    if file is None and path is None:
        file = shutil.which(program.name, path=_SYSTEM)
    if file is None:
        return Finding(title, False, needed, "missing", fix, (program.package,))
    if not program.ask:
        return Finding(title, True, needed, "installed")
    version = parse_version(_ask(file, program.ask))
    if version is None:
        return Finding(title, not program.minimum, needed, "tells no version", fix, (program.package,))
    shown = ".".join(map(str, version))
    if version < program.minimum:
        least = ".".join(map(str, program.minimum))
        return Finding(title, False, needed, f"{shown}, older than {least}", fix, (program.package,))
    return Finding(title, True, needed, shown)


def parse_version(text: str) -> tuple[int, ...] | None:
    """The first dotted number in what a program says about itself; None when there is none."""
    match = re.search(r"(?<![\w.])v?(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else None


def _ask(file: str, arguments: tuple[str, ...]) -> str:
    try:
        answer = subprocess.run(
            [file, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout[:4096].decode(errors="replace")
