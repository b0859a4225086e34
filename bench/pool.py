"""A pool service of the bench's own, and a place in which no pool is found; the user's own is left alone.

A provisioner finds a pool by the runtime directory, so each of the two here has a new one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import HostError
from sandbox_kernel.pool.client import status

RUNTIME = "XDG_RUNTIME_DIR"
READY = 120.0
"""Seconds that a pool may take until all that it is to keep wait."""
_END = 30.0
_POLL = 0.05
_CEILING = 16_384
"""MiB for the waiting VMs: the bench decides how many there are."""


class PoolTrouble(Exception):
    """A pool did not do what was asked of it."""


@dataclass(frozen=True)
class Pool:
    """A pool that runs.

    Attributes:
        process: the service.
        log: the file that it writes to.
        size: how many VMs it keeps.
    """

    process: subprocess.Popen[bytes]
    log: Path
    size: int

    def until_ready(self, seconds: float = READY) -> dict[str, Any]:
        """Waits until as many VMs wait as wanted; what `sandbox-kernel pool status` then tells.

        Raises:
            PoolTrouble: they do not within `seconds`, or the service has ended.
        """
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            told = _asked()
            if sum(vm["ready"] for vm in told.get("vms", ())) >= self.size:
                return told
            time.sleep(_POLL)
        said = self.log.read_text().strip()[-500:] or "nothing"
        raise PoolTrouble(f"The pool did not have {self.size} ready within {seconds:g} s; it said: {said}")


@contextmanager
def no_pool() -> Iterator[Path]:
    """This process's runtime directory is for a while a new one, in which no pool runs; its path."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skb-", ignore_cleanup_errors=True))
        stack.enter_context(environment({RUNTIME: folder}))
        yield Path(folder)


@contextmanager
def running(kernelspec: str, size: int = 1) -> Iterator[Pool]:
    """A pool that keeps `size` VMs for `kernelspec`, at this process's runtime directory; ready.

    Raises:
        PoolTrouble: see `Pool.until_ready`.
    """
    folder = Path(tempfile.mkdtemp(prefix="skb-pool-"))
    configuration, log = folder / "pool.toml", folder / "log"
    configuration.write_text(f"memory = {_CEILING}\n[kernels]\n{kernelspec} = {size}\n")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox_kernel.cli.main", "pool", "--config", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        pool = Pool(process, log, size)
        pool.until_ready()
        yield pool
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with `changes`, for a moment."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _asked() -> dict[str, Any]:
    try:
        return status()
    except HostError:  # not yet
        return {}
