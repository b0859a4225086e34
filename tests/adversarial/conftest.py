from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adversarial import table
from tests.adversarial.case import Outcome
from tests.adversarial.neighbour import Neighbour, p99

QUIET = 5.0
"""Seconds in which the neighbour is measured before the first attack."""
BETWEEN = 1.0
KEPT = 400


class Neighbourhood:
    """The neighbour, and what it was like in quiet times."""

    patience = 1.0
    """By how much an interrupt may be later than it should be."""

    def __init__(self) -> None:
        self._neighbour = Neighbour()
        time.sleep(QUIET)
        self._quiet = self._neighbour.latencies()

    def quiet(self) -> float:
        """p99 of the last quiet times, this moment's among them."""
        self._neighbour.latencies()
        time.sleep(BETWEEN)
        self._quiet = (self._quiet + self._neighbour.latencies())[-KEPT:]
        return p99(self._quiet)

    def meanwhile(self) -> float:
        """p99 since the last call of either."""
        return p99(self._neighbour.latencies())

    def close(self) -> None:
        self._neighbour.close()


class Nobody:
    """In the place of a neighbourhood: nobody to be disturbed, on a machine that may have other work."""

    patience = 4.0

    def quiet(self) -> float:
        return math.inf

    def meanwhile(self) -> float:
        return 0.0


@pytest.fixture(scope="session")
def neighbourhood(installed: None, pytestconfig: pytest.Config) -> Iterator[Neighbourhood | Nobody]:
    if pytestconfig.getoption("alone"):
        yield Nobody()
        return
    made = Neighbourhood()
    yield made
    made.close()


_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limits-table", type=Path, help="write the table of docs/limits.md to this file")
    parser.addoption(
        "--alone",
        action="store_true",
        help="without a neighbour, for whom everything else that a machine does would be the attack",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = []


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Any:
    """Notes an outcome for the table."""
    return pytestconfig.stash[_OUTCOMES].append


def pytest_sessionfinish(session: pytest.Session) -> None:
    place = session.config.getoption("limits_table", None)
    if place is not None:
        table.write(place, session.config.stash[_OUTCOMES])
