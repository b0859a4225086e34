"""The virtual environment of the suites: kept in the cache under a key of everything that shapes it.

What is tested is a wheel of this checkout, not the checkout: a suite that calls its folder `tests` must not
find ours, and an edit during a long run must not change what runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uv

from tests.conformance.lock import FOLDER

CHECKOUT = FOLDER.parent.parent
_PATIENCE = 1200.0


class SuiteEnvironmentError(Exception):
    """The virtual environment could not be made."""


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Keeps a second run out: it would change the environment under the first one, and its timing.

    Raises:
        SuiteEnvironmentError: another run is under way.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SuiteEnvironmentError(
                f"Another conformance run holds {lock.name}; wait until it has ended."
            ) from error
        yield


def prepare(cache: Path) -> Path:
    """Makes the environment where needed, installs this checkout into it and returns its Python."""
    lock = FOLDER / "requirements.lock"
    shape = [sys.version, lock.read_text(), (CHECKOUT / "pyproject.toml").read_text()]
    folder = cache / hashlib.sha256("\0".join(shape).encode()).hexdigest()[:16]
    if not (folder / "complete").is_file():
        _make(folder, lock)
    python = folder / "bin" / "python"
    _install(python, "--no-deps", "--reinstall-package", "sandbox-kernel", str(CHECKOUT))
    return python


def _make(folder: Path, lock: Path) -> None:
    """Makes the environment in its final place (scripts name their interpreter); the marker comes last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.iterdir():
        shutil.rmtree(old, ignore_errors=True)
    _uv("venv", "--python", sys.executable, str(folder))
    _install(folder / "bin" / "python", "-r", str(lock), str(CHECKOUT))
    (folder / "complete").touch()


def _install(python: Path, *what: str) -> None:
    _uv("pip", "install", "--python", str(python), *what)


def _uv(*arguments: str) -> None:
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [uv.find_uv_bin(), "--quiet", *arguments], stdout=log, stderr=log, timeout=_PATIENCE, check=False
        )
        log.seek(0)
        if done.returncode:
            raise SuiteEnvironmentError(f"`uv {' '.join(arguments)}` failed:\n{log.read().strip()[-2000:]}")
