"""The Debian part of an image, by mmdebstrap: a minimal system as a folder, and a kernel taken apart.

mmdebstrap runs as root or, in a user namespace, as anybody who has a range of subordinate user ids
(subuid(5)). Either way it hands over a tar archive, which is unpacked as the calling user: ownership is lost
on purpose (the image belongs to root throughout), device nodes are left out (devtmpfs makes them), and no
file keeps a set-user-id bit (nothing in the guest needs to raise its privileges).

mmdebstrap works in a folder of its own below the temporary directory, not in the image store: in a user
namespace another user id must reach it, which a private home does not allow. In such a namespace it can
leave files behind that only the namespace may remove.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import tool
from sandbox_kernel.image.recipe import Recipe

_ATTEMPTS = 20
_DOCUMENTATION = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
)


@dataclass(frozen=True)
class Bootstrap:
    """How to fetch Debian packages: release, mirror (None: mmdebstrap's own), folder for temporary files."""

    suite: str
    mirror: str | None
    temporary: Path

    def command(self, variant: str, packages: Sequence[str], target: Path) -> list[str]:
        """The argv that makes the tar archive `target`."""
        argv = ["mmdebstrap", "--quiet", f"--variant={variant}", "--architectures=amd64", "--format=tar"]
        argv += [f"--include={','.join(packages)}"]
        if variant != "extract":
            argv += [f"--dpkgopt={rule}" for rule in _DOCUMENTATION]
        argv += [self.suite, str(target)]
        return [*argv, self.mirror] if self.mirror else argv

    def start(self, variant: str, packages: Sequence[str], target: Path, purpose: str) -> tool.Running:
        """Starts to make the tar archive `target`.

        Raises:
            MissingToolError: mmdebstrap is not installed.
        """
        env = {**os.environ, "TMPDIR": str(self.temporary), "LC_ALL": "C.UTF-8"}
        return tool.start(self.command(variant, packages, target), purpose=purpose, env=env)


def require_subordinate_ids(uid: int, user: str, subuid: Path = Path("/etc/subuid")) -> None:
    """Refuses a user who can build no Debian system: not root, and without subordinate user ids.

    Raises:
        ImageError: with the command that gives such a range.
    """
    if uid == 0:
        return
    try:
        lines = subuid.read_text().splitlines()
    except OSError:
        lines = []
    if not any(line.split(":")[0] in (user, str(uid)) for line in lines):
        raise ImageError(
            f"User {user} has no range of subordinate ids in {subuid}, which building a Debian system takes; "
            f"get one with `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`."
        )


@contextmanager
def temporary_folder(store: Path) -> Iterator[Path]:
    """A folder for mmdebstrap, the same for each build into one store; what an earlier build left is removed.

    `TMPDIR` names where it lies, /var/tmp otherwise: the content is large and /tmp may be memory.
    """
    tag = f"{os.getuid()}-{store.stat().st_ino:x}"
    folder = Path(os.environ.get("TMPDIR") or "/var/tmp") / f"sandbox-kernel-build-{tag}"
    _remove(folder)
    folder.mkdir(mode=0o755)
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # What a user namespace has left belongs to other ids: only the root of one like it may remove it. More
    # than once, because the processes of a build that was killed this moment may still be writing.
    for _ in range(_ATTEMPTS):
        if not folder.exists():
            return
        folder.chmod(0o755)
        argv = ["mmdebstrap", "--unshare-helper", "rm", "-rf", str(folder)]
        tool.run(argv, purpose="Removing what an interrupted build has left", allowed=range(256))
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise ImageError(f"{folder}, left by an interrupted build, cannot be removed; remove it as root.")


def install(recipe: Recipe, bootstrap: Bootstrap, archive: Path, root: Path) -> None:
    """Makes the folder `root` with the recipe's Debian system.

    Raises:
        ImageError: a package is missing or the mirror cannot be reached.
    """
    with bootstrap.start("minbase", recipe.debian_packages, archive, "Installing Debian") as running:
        running.output()
    _unpack(archive, root, "./dev/*")
    archive.unlink()
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink() and path.stat().st_mode & 0o6000:
                path.chmod(path.stat().st_mode & 0o1777)


def fetch_kernel(recipe: Recipe, bootstrap: Bootstrap, archive: Path) -> tool.Running:
    """Starts to fetch the recipe's kernel packages, without installing them, into `archive`.

    Raises:
        MissingToolError: mmdebstrap is not installed.
    """
    return bootstrap.start("extract", recipe.kernel_packages, archive, "Fetching the guest kernel")


def unpack_kernel(archive: Path, folder: Path) -> None:
    """Unpacks what `fetch_kernel` fetched and deletes the archive.

    Raises:
        ImageError: tar failed.
    """
    _unpack(archive, folder, "./dev/*", "./usr/share/*", "./etc/*", "./var/*")
    archive.unlink()


def packages(root: Path) -> dict[str, str]:
    """Installed Debian packages and their versions, from dpkg's own database (deb-control(5))."""
    text = (root / "var/lib/dpkg/status").read_text()
    found = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return found


def _unpack(archive: Path, folder: Path, *leave_out: str) -> None:
    folder.mkdir()
    argv = [
        "tar",
        "--extract",
        f"--file={archive}",
        f"--directory={folder}",
        "--no-same-owner",
        "--preserve-permissions",
    ]
    argv += ["--wildcards", *(f"--exclude={pattern}" for pattern in leave_out)]
    tool.run(argv, purpose="Unpacking the Debian system")
