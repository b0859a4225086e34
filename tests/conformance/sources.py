"""Source distributions from the package index: fetched by pip, verified twice, kept in the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.conformance.lock import Sdist

_PATIENCE = 600.0


class SourceError(Exception):
    """A source distribution could not be had as it is pinned."""


def fetch(sdists: Iterable[Sdist], cache: Path) -> dict[Sdist, Path]:
    """The archives of `sdists`; only what the cache does not hold is downloaded.

    pip refuses a wrong hash before it looks into an archive (`--require-hashes`). It is our environment's
    pip, so that its configuration of an index holds here, too.

    Raises:
        SourceError: the index cannot be reached, or has something else under that version.
    """
    found = {sdist: cache / f"{sdist.sha256}.tar.gz" for sdist in sdists}
    missing = [sdist for sdist, path in found.items() if not path.is_file()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(missing, Path(folder))
            by_hash = {_sha256(path): path for path in Path(folder).glob("*.tar.gz")}
            for sdist in missing:
                if sdist.sha256 not in by_hash:
                    raise SourceError(
                        f"pip brought no archive of {sdist.name} {sdist.version} with its hash."
                    )
                by_hash[sdist.sha256].replace(found[sdist])
    for sdist, path in found.items():
        if _sha256(path) != sdist.sha256:
            raise SourceError(
                f"{path} is not {sdist.name} {sdist.version} as pinned; remove it and run again."
            )
    return found


def unpack(archive: Path, sdist: Sdist, folder: Path) -> Path:
    """Unpacks `archive` below `folder` and returns the tree's root.

    The package's own folder gets another name: Python's import system must find the installed one.
    """
    with tarfile.open(archive) as tar:
        # Python has had filters from 3.11.4 on; what is unpacked here has the hash we pinned.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **options)
    (root,) = folder.iterdir()
    (root / sdist.in_tree).rename(root / f"{sdist.in_tree}.in-tree")
    return root


def _download(sdists: Iterable[Sdist], folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{sdist.requirement}\n" for sdist in sdists))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    # Not `:all:`, which would have the build tools built from source as well.
    command += ["--no-binary", ",".join(sdist.name for sdist in sdists)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise SourceError(f"pip could not download the pinned sources:\n{done.stderr.strip()[-2000:]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
