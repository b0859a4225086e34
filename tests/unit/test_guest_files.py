"""Files of the kernel's user, as the agent reads and writes them for the host."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_agent import Agent, reaped, settings_for, short_folder

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def agent(home: Path) -> Iterator[Agent]:
    with reaped() as children:
        yield Agent(children, settings_for(home))


def refusal(agent: Agent, op: str, path: Path | str) -> str:
    reply, content = agent.ask(op, b"new" if op == "write" else b"", path=str(path))
    assert reply["ok"] is False
    assert content == b""
    return str(reply["message"])


def test_files_are_written_and_read_in_pieces(agent: Agent, home: Path) -> None:
    assert agent.ask("write", b"hello", path="note.txt")[0] == {"ok": True, "size": 5}
    assert agent.ask("write", b" world", path="note.txt", offset=5)[0] == {"ok": True, "size": 11}
    assert agent.ask("read", path=str(home / "note.txt"), offset=6, length=3) == (
        {"ok": True, "size": 11},
        b"wor",
    )
    assert agent.ask("read", path="note.txt", offset=100) == ({"ok": True, "size": 11}, b"")
    assert agent.ask("write", b"new", path="note.txt")[0] == {"ok": True, "size": 3}


def test_a_new_file_has_the_mode_asked_for(agent: Agent, home: Path) -> None:
    agent.ask("write", b"#!/bin/sh\n", path="run", mode=0o700)
    assert (home / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("op", ["read", "write"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(agent: Agent, home: Path, op: str) -> None:
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "socket"))
        for path in ("fifo", "socket", "ports", "/dev/null"):
            assert refusal(agent, op, path)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_link_in_place_of_a_file_is_not_followed(agent: Agent, home: Path, op: str) -> None:
    (home / "target").write_text("old")
    (home / "link").symlink_to(home / "target")
    assert "symbolic links" in refusal(agent, op, "link")
    assert (home / "target").read_text() == "old"


@pytest.mark.parametrize("name", ["mem", "environ", "oom_score_adj"])
def test_a_link_in_the_way_does_not_lead_into_the_agent_itself(agent: Agent, home: Path, name: str) -> None:
    (home / "folder").symlink_to("/proc/self")
    assert "not a regular file" in refusal(agent, "read", f"folder/{name}")
    # Only root gets as far as to open `environ` for writing.
    said = refusal(agent, "write", f"folder/{name}")
    assert "not a regular file" in said or (os.getuid() != 0 and "Permission denied" in said)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as somebody else")
def test_files_are_opened_with_the_rights_of_the_kernels_user_only(home: Path) -> None:
    (home / "roots").write_text("secret")
    (home / "roots").chmod(0o600)
    (home / "his").mkdir()
    os.chown(home / "his", NOBODY, NOBODY)
    with reaped() as children:
        agent = Agent(children, settings_for(home, NOBODY, NOBODY))
        for op in ("read", "write"):
            assert "Permission denied" in refusal(agent, op, "roots")
        assert "Permission denied" in refusal(agent, "write", "new")
        assert agent.ask("write", b"mine", path="his/file")[0]["ok"] is True
        (home / "his" / "way").symlink_to("/etc")
        assert "Permission denied" in refusal(agent, "read", "his/way/shadow")
    assert (home / "his" / "file").stat().st_uid == NOBODY
    assert (home / "roots").read_text() == "secret"
    assert os.geteuid() == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as somebody else")
def test_programs_run_as_the_kernels_user_unless_asked_otherwise(home: Path) -> None:
    with reaped() as children:
        agent = Agent(children, settings_for(home, NOBODY, NOBODY))
        assert agent.run("id", "-u")[1] == b"%d\n" % NOBODY
        assert agent.run("id", "-G")[1] == b"%d\n" % NOBODY
        assert agent.run("id", "-u", root=True)[1] == b"0\n"
        assert agent.run("sh", "-c", "kill -9 1; kill -9 $PPID")[0]["code"] == 1
        assert agent.ask("hello")[0]["ok"] is True
