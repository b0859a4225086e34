from __future__ import annotations

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


@pytest.fixture(scope="session")
def neighbourhood(installed: None) -> Iterator[Neighbourhood]:
    made = Neighbourhood()
    yield made
    made.close()


_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limits-table", type=Path, help="write the table of docs/limits.md to this file")


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
