"""What turns a Debian system into the guest's root: user and names, our programs, compiled Python, one file.

Python keeps compiled modules only while the source's time is the one noted in them. Every file therefore
gets the same time (`EPOCH`) before the guest's own Python compiles them, jailed and without network, and
the erofs image carries that time too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import packages, tool
from sandbox_kernel.image.programs import DIRECTORY, Program

EPOCH = 1735689600
"""Time of every file in an image: 2025-01-01 00:00 UTC."""

USER = "sandbox"
USER_ID = 1000
_UUID = "73616e64-626f-782d-6b65-726e656c0001"

_EMPTIED = ("boot", "var/cache", "var/log", "var/lib/apt/lists", "tmp", "run", "dev")
"""Folders whose content is made anew in a running system, or has no use in it."""
_FILES = {
    "etc/hostname": "sandbox\n",
    "etc/hosts": "127.0.0.1\tlocalhost sandbox\n::1\tlocalhost\n",
    "etc/resolv.conf": "",
    # Empty means: not set yet (machine-id(5)). Clones must not share one.
    "etc/machine-id": "",
    # History of other sessions there is none: each kernel has a disk of its own. Kept in memory, the history
    # of this one costs a fifth less of a cell's time than in a database on disk.
    "etc/ipython/ipython_config.py": 'c.HistoryManager.hist_file = ":memory:"\n',
}


def prepare(root: Path, suite: str) -> None:
    """Gives the root its names, its user and Debian's own archive, and empties what a build leaves behind."""
    for name in _EMPTIED:
        folder = root / name
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in _FILES.items():
        (root / name).unlink(missing_ok=True)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    # The build's mirror may be reachable from the build's machine only.
    (root / "etc/apt/sources.list").write_text(f"deb http://deb.debian.org/debian {suite} main\n")
    _add_line(root / "etc/passwd", f"{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/bash")
    _add_line(root / "etc/group", f"{USER}:x:{USER_ID}:")
    _add_line(root / "etc/shadow", f"{USER}:!:{EPOCH // 86400}:0:99999:7:::")
    _add_line(root / "etc/gshadow", f"{USER}:!::")
    (root / "home" / USER).mkdir(exist_ok=True)


def put_programs(root: Path, programs: Iterable[Program]) -> None:
    """Exchanges our own programs in the root for these."""
    folder = root / DIRECTORY
    shutil.rmtree(folder, ignore_errors=True)
    for program in programs:
        file = folder / program.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(program.content)
        file.chmod(0o644)


def compile_python(root: Path, everything: bool = True) -> None:
    """Gives every file its time, then compiles Python files with the guest's own Python.

    Args:
        root: the guest's root.
        everything: also the standard library and all packages; otherwise our own programs only.

    Raises:
        ImageError: the guest's Python cannot be run, or one of our programs does not compile.
    """
    ours = root / DIRECTORY
    library = [root / "usr/lib/python3", root / f"usr/lib/python{packages.python_version(root)}"]
    others = [*library, packages.site(root)] if everything else []
    for folder in (*others, ours):
        for cache in folder.rglob("__pycache__"):
            shutil.rmtree(cache)
    _set_times(root)
    argv = _in_root(root, "/usr/bin/python3", "-I", "-m", "compileall", "-qq", "-j", "0")
    if others:
        # Some packages carry files for other Pythons, templates even, that do not compile.
        argv_all = argv + [f"/{folder.relative_to(root)}" for folder in others]
        tool.run(argv_all, purpose="Compiling Python packages", allowed=(0, 1))
    if ours.is_dir():
        tool.run([*argv, f"/{DIRECTORY}"], purpose="Compiling the guest's programs")
    if others and not any((library[1] / "__pycache__").glob("os.*.pyc")):
        raise ImageError("The guest's Python compiled nothing; run `sandbox-kernel doctor`.")
    _set_times(root)


def pack(root: Path, image: Path) -> None:
    """Writes the root as a read-only erofs file system that belongs to root throughout.

    It is not compressed: the host's page cache holds it once for all VMs, and unpacking is slow when
    emulated.
    """
    argv: list[str | Path] = [
        "mkfs.erofs",
        "--quiet",
        "--all-root",
        f"-T{EPOCH}",
        f"-U{_UUID}",
        "-x-1",
        image,
        root,
    ]
    tool.run(argv, purpose="Writing the root file system")


def unpack(image: Path, root: Path) -> None:
    """The inverse of `pack`, as the calling user."""
    argv: list[str | Path] = [
        "fsck.erofs",
        "--preserve-perms",
        "--no-preserve-owner",
        f"--extract={root}",
        image,
    ]
    tool.run(argv, purpose="Unpacking the root file system")


def _in_root(root: Path, *argv: str) -> list[str]:
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--clearenv", "--setenv", "LC_ALL", "C.UTF-8"),
        *("--bind", str(root), "/", "--dev", "/dev", "--proc", "/proc", "--", *argv),
    ]


def _set_times(root: Path) -> None:
    when = (EPOCH, EPOCH)
    for folder, folders, files in os.walk(root, topdown=False):
        for name in (*folders, *files):
            os.utime(f"{folder}/{name}", when, follow_symlinks=False)
    os.utime(root, when)


def _add_line(file: Path, line: str) -> None:
    text = file.read_text() if file.exists() else ""
    if line not in text.splitlines():
        file.chmod(file.stat().st_mode | 0o200)
        file.write_text(f"{text}{line}\n")
