"""Which directories can be served."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.files.server import require
from sandbox_kernel.mount import parse

OVERLAY = """
set -e
mkdir lower upper top
mount -t tmpfs lower lower
mkdir lower/kept lower/other; echo text > lower/kept/file
mount -t tmpfs upper upper
mkdir upper/new upper/work
mount -t overlay overlay -o lowerdir=lower,upperdir=upper/new,workdir=upper/work top
mkdir top/writable
exec "$0" -c '
import sys
from sandbox_kernel.files.server import require
from sandbox_kernel.mount import parse
for place in sys.argv[1:]:
    try:
        require(parse(f"{place}:/data"))
        print("served")
    except Exception as error:
        print(error)
' "$@"
"""


def said(folder: Path, *places: str) -> list[str]:
    """What comes of serving them, in a mount namespace with an overlay of two file systems."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OVERLAY, sys.executable]
    words += [str(folder / place) for place in places]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_overlay_of_several_file_systems_is_refused_and_its_parts_are_not(tmp_path: Path) -> None:
    kept, writable, lower, upper = said(tmp_path, "top/kept", "top/writable", "lower/kept", "upper")
    assert kept == (
        f"{tmp_path}/top/kept lies on an overlay of several file systems, whose files cannot be served; "
        "mount a directory that lies elsewhere, on a disk or in a tmpfs."
    )
    assert "lies on an overlay" in writable
    assert (lower, upper) == ("served", "served")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no directory on this host"):
        require(parse(f"{tmp_path}/none:/data"))
    require(parse(f"{tmp_path}:/data"))
