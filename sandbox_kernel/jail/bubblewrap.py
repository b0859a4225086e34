"""The jail that QEMU runs in, built by bubblewrap (bwrap(1), 0.8 or later).

A jailed process has its own user, mount, PID, IPC, UTS and network namespaces, no capability, no way to get
one back (`no_new_privs`), and sees read-only: the loader's libraries, QEMU itself with its firmware, the
one image, and the RAM of the template that it is restored from; a template's maker alone may write to that.
There is no shell, no home, no /etc beyond the loader's cache, no socket. It dies with its parent.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sandbox_kernel.errors import MissingToolError

IMAGE = PurePosixPath("/image")
"""Where the image's folder appears in the jail."""

RAM = PurePosixPath("/ram")
"""Where a template's RAM appears in the jail."""

_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_SYSTEM = "/usr/sbin:/sbin:/usr/local/sbin"
"""Where programs lie that a usual user's search path does not name."""
_FIRMWARE = ("qemu", "seabios", "qemu-firmware")


@dataclass(frozen=True)
class Jail:
    """What a jailed program may see and inherit.

    Attributes:
        bwrap: path of bubblewrap.
        program: path of the program, the same inside and outside.
        image: folder bound to `/image`.
        devices: device nodes it may open.
        ram: file bound to `/ram`.
        ram_writable: whether it may write to that file, as only a template's maker does.
    """

    bwrap: Path
    program: Path
    image: Path
    devices: tuple[Path, ...] = ()
    ram: Path | None = None
    ram_writable: bool = False

    @property
    def needs_set_uid(self) -> bool:
        """Whether bubblewrap has its rights from its file, set-uid root, which `no_new_privs` would undo."""
        return os.geteuid() != 0 and bool(self.bwrap.stat().st_mode & stat.S_ISUID)

    def command(
        self, argv: Sequence[str], info_fd: int | None = None, block_fd: int | None = None
    ) -> list[str]:
        """The argv that runs `argv` in this jail.

        Args:
            argv: the program's own command line, paths as seen inside.
            info_fd: inherited descriptor on which bubblewrap reports the PID of the jail's first process
                as JSON (`child-pid`).
            block_fd: inherited descriptor; the jail's process waits before it does anything until there
                is a byte to read on it.
        """
        share = self.program.parent.parent / "share"
        words = [
            *confined(self.bwrap, self.program, tuple(share / name for name in _FIRMWARE)),
            "--as-pid-1",
            *("--proc", "/proc", "--dev", "/dev"),
            *("--ro-bind", str(self.image), str(IMAGE)),
            *("--chdir", "/"),
        ]
        if self.ram is not None:
            words += ["--bind" if self.ram_writable else "--ro-bind", str(self.ram), str(RAM)]
        for device in self.devices:
            words += ["--dev-bind", str(device), str(device)]
        if info_fd is not None:
            words += ["--info-fd", str(info_fd)]
        if block_fd is not None:
            words += ["--block-fd", str(block_fd)]
        return [*words, "--", *argv]


def confined(bwrap: Path, program: Path, also: Sequence[Path] = ()) -> list[str]:
    """What every jail begins with: namespaces of its own, no capability, nothing but `program` to be seen.

    Args:
        bwrap: path of bubblewrap.
        program: path of the program, the same inside and outside.
        also: what else it reads, likewise; what does not exist is left out.
    """
    words = [str(bwrap), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    words += ["--cap-drop", "ALL", "--hostname", "jail", "--clearenv"]
    return words + _seen(program, also)


def confined_within(bwrap: Path, program: Path, capabilities: Sequence[str]) -> list[str]:
    """What the jail of a program begins with that works on the network namespace it is started in.

    Args:
        bwrap: path of bubblewrap, started as root of the user namespace that the network belongs to.
        program: path of the program, the same inside and outside.
        capabilities: what it may do to that network.
    """
    words = [str(bwrap), "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "jail", "--clearenv"]
    for name in capabilities:
        words += ["--cap-add", name]
    return words + _seen(program)


def _seen(program: Path, also: Sequence[Path] = ()) -> list[str]:
    """The words that show a program, what it reads, and its libraries."""
    words: list[str] = []
    for path in (*map(Path, _LIBRARIES), *also):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    return [*words, "--ro-bind", str(program), str(program)]


def find(program: str, fix: str) -> Path:
    """The program's path.

    Args:
        program: its name.
        fix: what to do when it is missing, as the rest of a sentence.

    Raises:
        MissingToolError: it is not on the search path.
    """
    found = shutil.which(program) or shutil.which(program, path=_SYSTEM)
    if found is None:
        raise MissingToolError(f"{program} is not installed; {fix}.")
    return Path(found).resolve()
