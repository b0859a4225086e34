"""What is fuzzed: one module a parser, each with `fuzzing` and `seeds`.

`fuzzing()` is a context that gives a function from bytes to nothing: one run, after which nothing is left of
it. It raises what is a finding. `seeds()` gives the runs that a person thought of; with what the fuzzer
found, made small, they are the corpus (`tests/fuzz/corpus/NAME`).

Rules. Nothing here imports the fuzzer: pytest runs the corpora without it. A run is the same each time: no
clock, no chance, no thread decides what it does. What stands in for the system (sockets, epoll) does what
Linux does, and asserts what Linux would refuse.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, cast

NAMES = ("vsock", "vhost_user", "agent_host", "agent_guest", "zmtp", "relay", "network")

Run = Callable[[bytes], None]


class Target(Protocol):
    """A module of this package."""

    def fuzzing(self) -> AbstractContextManager[Run]: ...

    def seeds(self) -> Iterator[bytes]: ...


def load(name: str) -> Target:
    """A target by its name."""
    return cast(Target, importlib.import_module(f"{__name__}.{name}"))
