"""Pinned archives: verified, unpacked without the package's own folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from tests.conformance.lock import Sdist
from tests.conformance.sources import SourceError, fetch, unpack


def archive(path: Path) -> Sdist:
    """A small source distribution at `path`, pinned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (("pkg-1.0/pkg/__init__.py", b""), ("pkg-1.0/tests/test_a.py", b"import pkg\n")):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return Sdist("pkg", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "pkg")


def test_an_unpacked_tree_hides_the_packages_own_folder(tmp_path: Path) -> None:
    sdist = archive(tmp_path / "pkg.tar.gz")
    root = unpack(tmp_path / "pkg.tar.gz", sdist, tmp_path / "tree")
    assert (root / "tests" / "test_a.py").is_file()
    assert not (root / "pkg").exists()


def test_what_the_cache_holds_is_not_downloaded_again(tmp_path: Path) -> None:
    sdist = archive(tmp_path / "new.tar.gz")
    cached = tmp_path / f"{sdist.sha256}.tar.gz"
    (tmp_path / "new.tar.gz").rename(cached)
    assert fetch([sdist], tmp_path) == {sdist: cached}


def test_a_damaged_archive_in_the_cache_is_refused(tmp_path: Path) -> None:
    sdist = archive(tmp_path / "new.tar.gz")
    (tmp_path / f"{sdist.sha256}.tar.gz").write_bytes(b"something else")
    with pytest.raises(SourceError, match=r"is not pkg 1\.0 as pinned; remove it"):
        fetch([sdist], tmp_path)
