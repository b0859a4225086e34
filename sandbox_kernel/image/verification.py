"""Whether an image's files are still what was built, without reading half a gigabyte at each start.

A file that has been hashed and not been touched since is what it was. "Not touched" is decided as make and
git do, by device, inode, size and both times: ctime changes with every write and cannot be set back by a
program. The verdict lies in the cache; without it the files are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.manifest import Manifest, hash_file

REPAIR = "build it again with `sandbox-kernel image build`"


def verify(directory: Path, manifest: Manifest) -> None:
    """Checks every file of the image against its manifest.

    Raises:
        ImageError: a file is missing or damaged; it is named.
    """
    seen = {name: _fingerprint(directory / name) for name in manifest.files}
    # Two folders may hold the same image: of two users' data, or of two installations.
    place = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
    cache = paths.cache_dir() / "verified" / f"{manifest.digest()}-{place}"
    if _recall(cache) == seen:
        return
    for name, expected in manifest.files.items():
        found = hash_file(directory / name)
        if found != expected:
            raise ImageError(
                f"The image file {directory / name} is damaged: its sha256 is {found.sha256[:12]}… "
                f"({found.size} bytes) and must be {expected.sha256[:12]}… ({expected.size} bytes); {REPAIR}."
            )
    _remember(cache, seen)


def _fingerprint(file: Path) -> list[int]:
    try:
        found = file.stat()
    except OSError as error:
        raise ImageError(f"The image file {file} is missing ({error.strerror}); {REPAIR}.") from error
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _recall(cache: Path) -> object:
    try:
        return json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return None


def _remember(cache: Path, seen: dict[str, list[int]]) -> None:
    fresh = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(seen))
        fresh.replace(cache)
    except OSError:
        # A cache that cannot be written costs time, nothing else.
        with contextlib.suppress(OSError):
            fresh.unlink()
