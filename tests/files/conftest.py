"""A jailed server of one directory, as root (who jails it) and as an ordinary user."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree

import psutil
import pytest

from sandbox_kernel.files.server import command, limited
from sandbox_kernel.jail.bubblewrap import find
from sandbox_kernel.mount import parse
from tests.files.nine import Client

ORDINARY = 54321
"""Numeric id of a user whom nobody else is."""

Serve = Callable[..., Client]


@pytest.fixture(params=["as_root", "as_an_ordinary_user"])
def user(request: pytest.FixtureRequest) -> int:
    """Whose server it is; whoever is not root tests as himself."""
    if request.param == "as_root":
        if os.getuid() != 0:
            pytest.skip("this is not root")
        return 0
    return os.getuid() or ORDINARY


@pytest.fixture
def place(user: int) -> Iterator[Path]:
    """A folder of that user, with the directory that is served (`shared`) and what is not (`outside`)."""
    folder = Path(tempfile.mkdtemp(prefix="skf"))
    (folder / "shared").mkdir()
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").write_text("the host's secret")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)
    yield folder
    rmtree(folder)


@pytest.fixture
def serve(user: int, place: Path) -> Iterator[Serve]:
    """Serves `shared` and returns an attached client; `masked` are folders in there that are not shown."""
    with ExitStack() as stack:

        def start(access: str = "rw", masked: tuple[Path, ...] = ()) -> Client:
            ours, theirs = socket.socketpair()
            mount = parse(f"{place}/shared:/data:{access}")
            argv = limited(command(find("bwrap", "x"), find("diod", "x"), mount, masked, theirs.fileno()))
            who = (
                []
                if user == os.getuid()
                else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            )
            process = stack.enter_context(
                subprocess.Popen([*who, *argv], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
            )
            stack.callback(process.kill)
            theirs.close()
            client = Client(stack.enter_context(ours))
            client.process = psutil.Process(process.pid)  # type: ignore[attr-defined]
            return client.attach()

        yield start
