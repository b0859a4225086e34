"""The disk with the guest images that kernels in the lab run in: an image store as an erofs file system.

Its folder is laid out as `sandbox_kernel.image.store` says; the files are links to those of the user's store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sandbox_kernel.image import tool
from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.progress import Progress
from sandbox_kernel.image.store import Image, ImageStore

GUESTS = {"default": "trixie", "debian12": "bookworm"}
"""Guest images that the lab can have, and the Debian that each is."""

_LAYOUT = 1
"""Version of what is put on the disk: a change of it is a change of this number."""

_KEPT = 3


def images(names: Sequence[str], store: ImageStore, progress: Progress) -> list[Image]:
    """The images of these names, of the default recipe, built where needed: `default` in the user's store.

    Raises:
        HostError: a tool, space or the network is missing.
    """
    found = []
    for name in names:
        recipe = dataclasses.replace(default_recipe(), suite=GUESTS[name])
        users = ImageStore() if name == "default" else store
        found.append(build(Order(recipe, name), users, progress)[0])
    return found


def ensure(images: Sequence[Image], folder: Path) -> Path:
    """The disk with these images, under their names, made where it is not there yet.

    Args:
        images: from any store.
        folder: where disks are kept; the oldest are removed.

    Raises:
        HostError: a tool or space is missing.
    """
    key = f"{_LAYOUT}" + "".join(f"{image.name} {image.digest}\n" for image in images)
    disk = folder / f"guests-{hashlib.sha256(key.encode()).hexdigest()[:16]}.erofs"
    if disk.exists():
        return disk
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workshop, tool.disk_errors(folder):
        store = Path(workshop, "store")
        for image in images:
            _lay(image, store)
        fresh = Path(workshop, "disk")
        tool.run(["mkfs.erofs", "--quiet", "--all-root", fresh, store], purpose="Writing the disk of guests")
        for old in sorted(folder.glob("guests-*.erofs"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
            old.unlink()
        fresh.replace(disk)
    return disk


def _lay(image: Image, store: Path) -> None:
    place = store / image.digest
    if not place.exists():
        place.mkdir(parents=True)
        for file in image.directory.iterdir():
            _link(file, place / file.name)
    for kind, name in (("names", image.name), ("inputs", image.manifest.input_digest)):
        (store / kind).mkdir(exist_ok=True)
        (store / kind / name).symlink_to(f"../{image.digest}")


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system
        shutil.copyfile(file, place)
