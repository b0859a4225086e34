"""Where images are kept: a folder per content, names that point to it, and one builder at a time.

    images/
      3f5c…/                 initrd, root.erofs, vmlinux, manifest.json; never changed after it got its name
      names/default          symbolic link to ../3f5c…
      inputs/9a01…           symbolic link from a recipe's digest to what it gave
      .build-xxxx/           a build that is going on, or what an interrupted one left
      .lock                  locked by whoever builds or removes

A folder appears under its name by rename(2), complete or not at all; a link is exchanged the same way.
Readers take no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import ConfigurationError, ImageError
from sandbox_kernel.image import manifest as manifests
from sandbox_kernel.image.manifest import Manifest
from sandbox_kernel.image.verification import verify

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_DIGEST = r"[0-9a-f]{64}"
_SHORT = r"[0-9a-f]{12,64}"
_UNFINISHED = ".build-"


@dataclass(frozen=True)
class Image:
    """One image in the store.

    Attributes:
        name: what it was asked for as.
        digest: its name by content.
        directory: folder of its files.
        vmlinux: the guest's kernel, an ELF file.
        initrd: the initramfs.
        root: the root file system, erofs.
        manifest: what is known about it.
    """

    name: str
    digest: str
    directory: Path
    vmlinux: Path
    initrd: Path
    root: Path
    manifest: Manifest


def check_name(name: str) -> str:
    """`name`, if an image may be called so.

    Raises:
        ConfigurationError: it may not.
    """
    if not re.fullmatch(_NAME, name) or ".." in name:
        raise ConfigurationError(
            f"{name!r} is no name for an image; allowed are 1 to 128 letters, digits, `.`, `_` and `-`, "
            "beginning with a letter or digit."
        )
    return name


class ImageStore:
    """The images of one user."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is created when something is put into it; the XDG data directory's when None."""
        self.directory = directory or paths.data_dir() / "images"

    def open(self, name: str = "default") -> Image:
        """The image called `name`, or whose digest begins with `name` (12 digits at least), verified.

        Raises:
            ConfigurationError: no image can have such a name.
            ImageError: there is none, or a file of it is missing or damaged.
        """
        folder = self._find(check_name(name))
        image = self._read(name, folder)
        verify(folder, image.manifest)
        return image

    def digest_of(self, name: str) -> str:
        """The digest of the image called `name`, as `open` would find it; the image itself is not looked at.

        Raises:
            ConfigurationError: no image can have such a name.
            ImageError: there is none.
        """
        return self._find(check_name(name)).name

    def list(self) -> list[Image]:
        """Every image with every name it has, sorted; one without a name has the empty name. Not verified.

        What cannot be read is left out.
        """
        found = []
        named = set()
        for link in sorted(self._links("names")):
            with contextlib.suppress(ImageError):
                found.append(self._read(link.name, link.resolve()))
                named.add(found[-1].digest)
        for folder in sorted(self.directory.glob("*")):
            if re.fullmatch(_DIGEST, folder.name) and folder.name not in named:
                with contextlib.suppress(ImageError):
                    found.append(self._read("", folder))
        return found

    def remove(self, name: str) -> str:
        """Takes the name away, or all names when `name` is a digest; deletes the image when no name is left.

        Returns:
            The digest of the image that the name stood for.

        Raises:
            ConfigurationError: no image can have such a name.
            ImageError: there is no such image.
        """
        with self.locked():
            folder = self._find(check_name(name))
            for link in self._links("names"):
                if link.name == name or (folder.name.startswith(name) and link.resolve() == folder.resolve()):
                    link.unlink()
            if not any(link.resolve() == folder.resolve() for link in self._links("names")):
                for link in self._links("inputs"):
                    if link.resolve() == folder.resolve():
                        link.unlink()
                shutil.rmtree(folder, ignore_errors=True)
            return folder.name

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other builders out; `waiting` is called first when one has to be waited for."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder to build in, deleted at the end; only for who holds the lock.

        What interrupted builders left is deleted first: nobody else builds now.
        """
        for leftover in self.directory.glob(f"{_UNFINISHED}*"):
            _delete(leftover)
        folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.directory))
        try:
            yield folder
        finally:
            _delete(folder)

    def built_from(self, input_digest: str) -> Image | None:
        """The image that a recipe gave, if it is here and undamaged."""
        link = self.directory / "inputs" / input_digest
        with contextlib.suppress(ImageError):
            image = self._read("", link.resolve())
            verify(image.directory, image.manifest)
            return image
        return None

    def with_base(self, base_digest: str) -> Image | None:
        """An undamaged image that differs from the recipe's in our own programs at most."""
        for image in self.list():
            if image.manifest.base_digest == base_digest:
                with contextlib.suppress(ImageError):
                    verify(image.directory, image.manifest)
                    return image
        return None

    def adopt(self, folder: Path, manifest: Manifest) -> str:
        """Moves a finished image into the store; returns its digest. Only for who holds the lock.

        A folder that has the digest already is exchanged: it may be the damaged one.
        """
        (folder / manifests.FILE).write_text(manifest.to_json())
        digest = manifest.digest()
        place = self.directory / digest
        if place.exists():
            place.replace(folder.parent / "replaced")
        folder.chmod(0o755)
        folder.replace(place)
        self._link("inputs", manifest.input_digest, digest)
        return digest

    def call(self, digest: str, name: str) -> Image:
        """Gives an image of the store a name, which may have been another's; only for who holds the lock."""
        self._link("names", check_name(name), digest)
        return self._read(name, self.directory / digest)

    def _find(self, name: str) -> Path:
        link = self.directory / "names" / name
        if link.is_symlink():
            folder = link.resolve()
            if re.fullmatch(_DIGEST, folder.name) and folder.parent == self.directory.resolve():
                return self.directory / folder.name
        if re.fullmatch(_SHORT, name):
            found = [path for path in self.directory.glob(f"{name}*") if re.fullmatch(_DIGEST, path.name)]
            if len(found) == 1:
                return found[0]
        which = "" if name == "default" else f" --name {name}"
        raise ImageError(
            f"There is no image {name!r} in {self.directory}; run `sandbox-kernel image build{which}`."
        )

    def _read(self, name: str, folder: Path) -> Image:
        manifest = manifests.read(folder)
        if manifest.digest() != folder.name:
            raise ImageError(
                f"{folder / manifests.FILE} belongs to another image; run `sandbox-kernel image build`."
            )
        return Image(
            name=name,
            digest=folder.name,
            directory=folder,
            vmlinux=folder / "vmlinux",
            initrd=folder / "initrd",
            root=folder / "root.erofs",
            manifest=manifest,
        )

    def _links(self, kind: str) -> tuple[Path, ...]:
        return tuple(path for path in (self.directory / kind).glob("*") if path.is_symlink())

    def _link(self, kind: str, name: str, digest: str) -> None:
        folder = self.directory / kind
        folder.mkdir(exist_ok=True)
        fresh = folder / f".{name}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("..") / digest)
        fresh.replace(folder / name)


def _delete(folder: Path) -> None:
    """Deletes a tree of ours, also where a directory in it denies us writing."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for path, _, _ in os.walk(folder):
            Path(path).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
