"""A host directory in a guest, as a person writes it: `SOURCE:TARGET[:OPTION,…]`.

    /data:/data                     read-only
    {cwd}:{cwd}:rw                  the kernel's own directory, at the same path
    /results:/out:rw,written=500    at most 500 MiB are written there, in all of the kernel's life

`{cwd}` is the directory that the client starts the kernel in, `{notebook_dir}` the notebook's, which
Jupyter's server tells, otherwise the same. Options: `ro` (the default) or `rw`; `written=MiB` and
`files=NUMBER` bound what is written and how many files, directories and links are made, in all; 0 or nothing
is no bound.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sandbox_kernel.errors import ConfigurationError

PATTERN = r"(/|\{(cwd|notebook_dir)\})[^:\0]*:(/|\{(cwd|notebook_dir)\})[^:\0]*(:[a-z0-9=,]*)?"
"""What a mount looks like; see `parse` for what it must be."""
ROOT_PATTERN = r"/[^:\0]*(:ro)?"
"""What an administrator's `mount_roots` have: a directory, and `:ro` where nothing below may be written."""
PLACES = ("cwd", "notebook_dir")

_LARGEST = 1 << 40
_LONGEST = 1024
_SYSTEM = ("/proc", "/sys", "/dev", "/run", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/boot")
"""Of the guest: nothing is laid over them."""


@dataclass(frozen=True)
class Mount:
    """One mount, with nothing left to be filled in.

    Attributes:
        source: directory of the host, absolute and without `..`.
        target: path in the guest, likewise.
        writable: whether the guest may write there.
        written: bytes that it may write in all; 0: any number.
        files: files, directories and links that it may make in all; 0: any number.
    """

    source: PurePosixPath
    target: PurePosixPath
    writable: bool = False
    written: int = 0
    files: int = 0

    def __str__(self) -> str:
        """The text that this is parsed from."""
        options = ["rw" if self.writable else "ro"]
        if self.written:
            options.append(f"written={self.written >> 20}")
        if self.files:
            options.append(f"files={self.files}")
        return f"{self.source}:{self.target}:{','.join(options)}"


def parse(text: str) -> Mount:
    """The mount that `text` describes.

    Raises:
        ConfigurationError: it is none, or lies where none can.
    """
    if not re.fullmatch(PATTERN, text) or "{" in text[:1] or ":{" in text:
        raise ConfigurationError(
            f"{text[:200]!r} is no mount; write SOURCE:TARGET or SOURCE:TARGET:rw, both absolute paths."
        )
    source, target, *rest = text.split(":")
    found: dict[str, int] = {}
    writable = False
    for option in filter(None, ",".join(rest).split(",")):
        name, _, value = option.partition("=")
        if option in ("ro", "rw"):
            writable = option == "rw"
        elif name in ("written", "files") and value.isdigit() and int(value) <= _LARGEST:
            found[name] = int(value)
        else:
            raise ConfigurationError(
                f"The mount of {source} has the option {option!r}; allowed are ro, rw, written=MiB and "
                "files=NUMBER."
            )
    host = _tidy(source)
    mount = Mount(
        host,
        guest_place(target, str(host)),
        writable,
        found.get("written", 0) << 20,
        found.get("files", 0),
    )
    if mount.source == PurePosixPath("/"):
        raise ConfigurationError("The host's root cannot be mounted; name a directory below it.")
    return mount


def guest_place(target: str, what: str) -> PurePosixPath:
    """The path `target` of the guest, without `..`, where `what` can be mounted.

    Raises:
        ConfigurationError: the guest's system is there.
    """
    place = _tidy(target)
    if any(place.is_relative_to(needed) for needed in _SYSTEM) or place == PurePosixPath("/"):
        raise ConfigurationError(
            f"{what} cannot be mounted on {place}, which the guest's system needs; choose another path, such "
            "as /data."
        )
    return place


def fill_in(texts: Iterable[str], places: Mapping[str, str]) -> tuple[str, ...]:
    """`texts` with `{cwd}` and `{notebook_dir}` replaced by what `places` has for them.

    Raises:
        ConfigurationError: a path cannot be written in a mount.
    """

    def place(found: re.Match[str]) -> str:
        path = places[found[1]]
        if ":" in path or "{" in path:
            raise ConfigurationError(
                f"The directory {path} cannot be mounted, as its name has a `:` or `{{`; rename it."
            )
        return path

    return tuple(re.sub(r"\{(cwd|notebook_dir)\}", place, text) for text in texts)


def check(mounts: Sequence[Mount], roots: Sequence[str] | None) -> None:
    """Whether these mounts can be together, and below what an administrator allows.

    Args:
        mounts: of one guest.
        roots: as `ROOT_PATTERN` describes; None: all of the host.

    Raises:
        ConfigurationError: they cannot.
    """
    targets = [mount.target for mount in mounts]
    for mount in mounts:
        if targets.count(mount.target) > 1:
            raise ConfigurationError(
                f"Two directories are to be mounted on {mount.target}; give each a path of its own."
            )
        if roots is not None and not any(_permits(root, mount) for root in roots):
            allowed = ", ".join(roots) if roots else "none"
            raise ConfigurationError(
                f"{mount.source} is to be mounted {'read-write' if mount.writable else 'read-only'}, and the "
                f"administrator allows mounts below: {allowed} (mount_roots); choose a directory there."
            )


def places(cwd: object, session: str) -> dict[str, str]:
    """What is filled in for `PLACES`.

    Args:
        cwd: directory that the client asks for, relative or not; falsy for its own.
        session: the notebook's path, as Jupyter's server tells it (JPY_SESSION_NAME); anything else without.
    """
    directory = str(Path.cwd() / str(cwd or "."))
    notebook = PurePosixPath(session)
    where = str(notebook.parent) if notebook.is_absolute() else directory
    return {"cwd": posixpath.normpath(directory), "notebook_dir": posixpath.normpath(where)}


def host_path(mounts: Iterable[Mount], path: str) -> str | None:
    """The host's path for a guest's path, None where that lies in no mount; the innermost mount counts."""
    wanted = _tidy(path)
    below = [mount for mount in mounts if wanted.is_relative_to(mount.target)]
    if not wanted.is_absolute() or not below:
        return None
    mount = max(below, key=lambda mount: len(mount.target.parts))
    return str(mount.source / wanted.relative_to(mount.target))


def _permits(root: str, mount: Mount) -> bool:
    folder, _, access = root.partition(":")
    return mount.source.is_relative_to(_tidy(folder)) and not (mount.writable and access == "ro")


def _tidy(path: str) -> PurePosixPath:
    if len(path) > _LONGEST:
        raise ConfigurationError(f"The path {path[:80]}… has over {_LONGEST} characters; use a shorter one.")
    return PurePosixPath(posixpath.normpath("/" + path.lstrip("/") if path.startswith("/") else path))
