"""What `suites.toml` says, as frozen data. Pure."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sdist:
    """A pinned source distribution.

    Attributes:
        name: of the project.
        version: exact.
        sha256: of the archive, in hexadecimal.
        in_tree: folder of the package in the archive, which has to give way to the installed one.
    """

    name: str
    version: str
    sha256: str
    in_tree: str

    @property
    def requirement(self) -> str:
        """The line of a requirements file that pins it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Suite:
    """Tests of one source distribution that run in one process.

    Attributes:
        name: how the suite is called here.
        sdist: where its tests come from.
        tests: files or folders of the source distribution, or modules when `installed`.
        installed: the tests are part of the installed package.
        beside: files of this folder that are put beside the source distribution's and run, too.
        guest: packages that its cells import beside the default image's.
        config: the VM's configuration, as in the environment, where it is not the default one.
        quick: part of `--quick`.
        warnings: filters of Python's warnings, added to the suite's own.
        patience: factor on the waits of the suite's client calls.
        timeout: seconds per test.
        deadline: seconds for the whole suite.
    """

    name: str
    sdist: Sdist
    tests: tuple[str, ...]
    installed: bool = False
    beside: tuple[str, ...] = ()
    guest: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict, hash=False)
    quick: bool = False
    warnings: tuple[str, ...] = ()
    patience: float = 1.0
    timeout: float = 300.0
    deadline: float = 3600.0


def parse(text: str) -> tuple[Suite, ...]:
    """The suites of a `suites.toml`.

    Raises:
        KeyError: a suite names a source distribution that is not pinned.
        TypeError: a key is unknown or missing.
    """
    document = tomllib.loads(text)
    sdists = {entry["name"]: Sdist(**entry) for entry in document["sdist"]}
    return tuple(
        Suite(
            **entry
            | {
                "sdist": sdists[entry["sdist"]],
                "tests": tuple(entry["tests"]),
                "beside": tuple(entry.get("beside", ())),
                "guest": tuple(entry.get("guest", ())),
                "warnings": tuple(entry.get("warnings", ())),
            }
        )
        for entry in document["suite"]
    )


def load() -> tuple[Suite, ...]:
    """The suites of this folder's `suites.toml`."""
    return parse((FOLDER / "suites.toml").read_text())


def select(suites: Sequence[Suite], names: Sequence[str], quick: bool) -> tuple[Suite, ...]:
    """The suites that were asked for; `ipykernel` stands for every `ipykernel.…`.

    Raises:
        LookupError: a name that is no suite's.
    """
    chosen = [suite for suite in suites if suite.quick or not quick]
    for name in names:
        if not any(_named(suite, name) for suite in suites):
            known = ", ".join(suite.name for suite in suites)
            raise LookupError(f"There is no suite {name!r}; there are {known}.")
    return tuple(suite for suite in chosen if not names or any(_named(suite, name) for name in names))


def _named(suite: Suite, name: str) -> bool:
    return suite.name == name or suite.name.startswith(name + ".")
