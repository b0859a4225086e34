"""The VM that is attacked: restored where that is said, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from tests.adversarial.case import Case
from tests.microvm import Kernel, microvm

STARTS = {"restored": "auto", "cold": "cold"}


@contextmanager
def victim(case: Case, start: str, image: str = "default") -> Iterator[Kernel]:
    """A kernel as the case has it, started as `start` says, that has run a cell."""
    if start == "restored":
        template.ensure(VMSpec(image=image, **case.config), Silent())
    with microvm(start=STARTS[start], image=image, **case.config) as kernel:
        assert kernel.manager.provisioner.report["start"] == start
        kernel.run("'warm'")
        yield kernel
