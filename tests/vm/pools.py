"""Pools of VMs for tests: `with pool() as it: it.wait()`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from sandbox_kernel.pool import client
from tests.microvm import READY, Kernel, until


class Pool:
    """A pool of its own, in the runtime directory that the environment names; see the fixture `runtime`."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sandbox_kernel.cli.main", "pool", *options],
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self) -> dict[str, Any]:
        return client.status()

    def vms(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self.told()["vms"]
        except Exception:  # it has not come up yet
            return []
        return found

    def ready(self) -> list[dict[str, Any]]:
        return [vm for vm in self.vms() if vm["ready"]]

    def wait(self, count: int = 1) -> list[dict[str, Any]]:
        assert until(lambda: len(self.ready()) >= count, READY), self.told()
        return self.ready()

    def family(self) -> list[psutil.Process]:
        """It and all that descend from it, what it gave included."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def end(self) -> str:
        """Ends it and returns its log."""
        self.process.terminate()
        return self.process.communicate(timeout=READY)[1]


@contextmanager
def pool(size: int = 1) -> Iterator[Pool]:
    """A pool that keeps `size` VMs, which need not be ready yet; ended afterwards."""
    made = Pool("--size", f"python3-microvm={size}")
    try:
        yield made
    finally:
        made.end()


def started(kernel: Kernel) -> str:
    """How a kernel came to be: cold, restored or pooled."""
    report: dict[str, Any] = kernel.manager.provisioner.report
    return str(report["start"])
