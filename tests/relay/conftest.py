from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.relay.rig import Rig, rig


class MakeRig(Protocol):
    def __call__(self, **options: Any) -> Rig: ...


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    with ExitStack() as stack:

        def make(**options: Any) -> Rig:
            # pytest's own folders are too deep for a Unix socket's 107 bytes.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-")))
            return stack.enter_context(rig(folder, **options))

        yield make


@pytest.fixture
def running(make_rig: MakeRig) -> Rig:
    """A kernel behind an attached relay."""
    made = make_rig()
    made.start()
    return made
