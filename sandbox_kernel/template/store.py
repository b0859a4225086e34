"""Where templates are kept: a folder per key, made by one builder at a time, checked on use.

    templates/
      8c1f…/            ram, state, manifest.json; never changed after it got its name
      .build-8c1f…/     one that is being made, or what an interrupted maker left
      .lock-8c1f…       locked by whoever makes it

A folder appears under its name by rename(2), complete or not at all. What was saved and not been touched
since is what it was: device, inode, size and both times of each file must be as they were when it got its
name. ctime changes with every write and cannot be set back by a program, so neither a broken disk's repair
nor a VM that got out of its jail changes a template unnoticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel import paths
from sandbox_kernel.errors import HostError, NoSpaceError
from sandbox_kernel.template.key import TemplateKey

log = logging.getLogger(__name__)

RAM = "ram"
STATE = "state"
_MANIFEST = "manifest.json"
_LEAST = 1 << 20
"""Bytes; less are as good as none."""
_DIGITS = 24
_DIGEST = rf"[0-9a-f]{{{_DIGITS}}}"


@dataclass(frozen=True)
class Template:
    """One template in the store.

    Attributes:
        digest: its name.
        directory: folder of its files.
        key: what it is for, as JSON values.
        qemu: version of the QEMU that saved it, and restores it.
        created: time of its making, seconds since the epoch.
        bytes: what it takes on disk.
        used: time of its last use, seconds since the epoch.
    """

    digest: str
    directory: Path
    key: dict[str, Any]
    qemu: tuple[int, ...]
    created: float
    bytes: int
    used: float

    @property
    def ram(self) -> Path:
        """The RAM, mapped private by each clone."""
        return self.directory / RAM

    @property
    def state(self) -> Path:
        """The devices' state."""
        return self.directory / STATE


class TemplateStore:
    """The templates of one user."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is created when something is put into it; the XDG data directory's when None."""
        self.directory = directory or paths.data_dir() / "templates"

    def open(self, key: TemplateKey) -> Template | None:
        """The template for `key`, checked; None when there is none. A damaged one is discarded."""
        folder = self.directory / key.digest()
        if not folder.exists():
            return None
        try:
            found = _read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the template %s is damaged (%s) and is discarded", folder.name, error)
            self._discard(folder)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / _MANIFEST)
        return found

    def all(self) -> list[Template]:
        """Every readable template, the last used first."""
        found = []
        for folder in self.directory.glob("*"):
            if re.fullmatch(_DIGEST, folder.name):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    found.append(_read(folder))
        return sorted(found, key=lambda each: each.used, reverse=True)

    def remove(self, digest: str) -> None:
        """Deletes a template; VMs that were restored from it go on.

        Raises:
            HostError: there is none of that name.
        """
        chosen = [each for each in self.directory.glob("*") if each.name.startswith(digest)]
        chosen = [each for each in chosen if re.fullmatch(_DIGEST, each.name)]
        if len(chosen) != 1:
            raise HostError(
                f"There is no template {digest!r}; `sandbox-kernel template ls` shows those there are."
            )
        self._discard(chosen[0])

    def forget(self, image: str) -> list[str]:
        """Deletes the templates of the image with the digest `image`; returns their names."""
        gone = [each for each in self.all() if each.key.get("image") == image]
        for template in gone:
            self._discard(template.directory)
        return [each.digest for each in gone]

    def collect(self, limit: int) -> list[str]:
        """Deletes the least recently used until the rest takes at most `limit` bytes; returns their names."""
        gone = []
        total = 0
        for template in self.all():
            total += template.bytes
            if total > limit:
                self._discard(template.directory)
                gone.append(template.digest)
        return gone

    @contextmanager
    def make(self, key: TemplateKey) -> Iterator[Path | None]:
        """A folder to save a template in; None while somebody else makes the same one.

        The caller puts `ram` and `state` there and calls `publish`; what is not published is deleted.

        Raises:
            NoSpaceError: there is no room.
            HostError: the folder cannot be made.
        """
        digest = key.digest()
        staging = self.directory / f".build-{digest}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.directory / f".lock-{digest}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _of_the_host(error) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            try:
                shutil.rmtree(staging, ignore_errors=True)
                self._sweep()
                staging.mkdir(mode=0o700)
            except OSError as error:
                raise _of_the_host(error) from error
            try:
                yield staging
            except OSError as error:
                raise _of_the_host(error) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(lock)

    def publish(self, staging: Path, key: TemplateKey, qemu: tuple[int, ...]) -> Template:
        """Gives what lies in `staging` its name.

        Args:
            staging: from `make`.
            key: what it is for.
            qemu: version of the QEMU that saved it.

        Raises:
            NoSpaceError: there is no room.
        """
        folder = self.directory / key.digest()
        try:
            for name in (RAM, STATE):
                with (staging / name).open("rb") as file:
                    os.fsync(file.fileno())
            content = {
                "key": asdict(key),
                "qemu": qemu,
                "created": (staging / STATE).stat().st_mtime,
                "files": {name: _fingerprint(staging / name) for name in (RAM, STATE)},
            }
            (staging / _MANIFEST).write_text(json.dumps(content))
            self._discard(folder)
            staging.rename(folder)
        except OSError as error:
            raise _of_the_host(error) from error
        return _read(folder)

    def check_room(self) -> None:
        """Tells a maker that has failed whether it was for want of room, which QEMU does not say.

        RAM in a file takes room as it is written to; where there is none left, Linux sends SIGBUS (mmap(2)).

        Raises:
            NoSpaceError: the file system is full.
        """
        found = os.statvfs(self.directory)
        if found.f_bavail * found.f_frsize < _LEAST or (found.f_files and not found.f_favail):
            raise NoSpaceError(f"There is no space left for a template ({self.directory}); free some.")

    def _sweep(self) -> None:
        """Deletes what makers left who were killed: nobody holds their locks any more."""
        for left in self.directory.glob(".build-*"):
            name = left.name.replace(".build-", ".lock-", 1)[: len(".lock-") + _DIGITS]
            with (self.directory / name).open("a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Deletes a template, so that nobody ever sees half of it."""
        away = folder.with_name(f".build-{folder.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _read(folder: Path) -> Template:
    manifest = folder / _MANIFEST
    content = json.loads(manifest.read_bytes())
    for name in (RAM, STATE):
        if content["files"][name] != _fingerprint(folder / name):
            raise ValueError(f"{name} is not what was saved")
    return Template(
        folder.name,
        folder,
        dict(content["key"]),
        tuple(int(part) for part in content["qemu"]),
        float(content["created"]),
        sum((folder / name).stat().st_blocks * 512 for name in (RAM, STATE)),
        manifest.stat().st_mtime,
    )


def _fingerprint(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _of_the_host(error: OSError) -> HostError:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return NoSpaceError(f"There is no space left for a template ({error.filename}); free some.")
    return HostError(f"The template cannot be kept ({error}); make its folder writable.")
