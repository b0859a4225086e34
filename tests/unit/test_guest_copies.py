"""Trees that the agent copies for the host, over its own server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_agent import Agent, answer, reaped, settings_for, short_folder

from agent_protocol import HEADER, MAX_COPIES, pack, parse_header, parse_message
from agent_tree import HEAD, LENGTH, PIECE, Limits, Place, Receiver, Sender, Tally, Wire
from sandbox_kernel.agent import answers
from tests.microvm import until

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def agent(home: Path) -> Iterator[Agent]:
    with reaped() as children:
        yield Agent(children, settings_for(home))


def begin(agent: Agent, **request: object) -> socket.socket:
    """The connection of a copy that was granted."""
    connection = agent.connect()
    connection.sendall(pack(request))
    assert granted(connection) == {"ok": True}
    return connection


def granted(connection: socket.socket) -> dict[str, object]:
    """The answer, of which no byte too many is read."""
    json_length, _ = parse_header(connection.recv(HEADER.size, socket.MSG_WAITALL))
    return parse_message(connection.recv(json_length, socket.MSG_WAITALL))


def pull(agent: Agent, path: str, target: Path) -> Tally:
    place = Place.at(str(target), "copy", lambda folder: os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    try:
        with begin(agent, op="pull", path=path) as connection:
            receiver = Receiver(Wire(connection, 20), Limits())
            receiver.receive(place)
            assert connection.recv(1) == b""
            return receiver.tally
    finally:
        place.close()


def push(agent: Agent, source: Path, **request: object) -> Tally:
    fd = os.open(source, os.O_RDONLY)
    try:
        with begin(agent, op="push", **request) as connection:
            Sender(Wire(connection, 20, heed=True)).send(fd)
            return answers.copied(answers.accepted(answer(connection)[0]))
    finally:
        os.close(fd)


def refusal(agent: Agent, **request: object) -> str:
    reply, content = agent.ask(str(request.pop("op")), **request)
    assert reply["ok"] is False
    assert content == b""
    return str(reply["message"])


def test_a_tree_comes_and_goes(agent: Agent, home: Path, tmp_path: Path) -> None:
    (home / "data" / "empty").mkdir(parents=True)
    (home / "data" / "file").write_bytes(os.urandom(PIECE + 7))
    pulled = pull(agent, "data", tmp_path)
    assert (pulled.files, pulled.directories, pulled.size) == (1, 2, PIECE + 7)
    pushed = push(agent, tmp_path / "copy", path="again")
    assert (pushed.files, pushed.directories, pushed.size) == (1, 2, PIECE + 7)
    assert (home / "again" / "file").read_bytes() == (home / "data" / "file").read_bytes()
    assert (home / "again" / "empty").is_dir()


def test_what_is_pushed_to_a_directory_goes_into_it_under_its_name(
    agent: Agent, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (home / "there").mkdir()
    push(agent, tmp_path / "file", path="there", name="file")
    push(agent, tmp_path / "file", path=str(home / "other"), name="file")
    push(agent, tmp_path, path="there")
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
        "other",
        "there/file",
    ]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\0b", "", "n" * 256, 5])
def test_a_name_that_is_none_is_refused(agent: Agent, name: object) -> None:
    assert "name" in refusal(agent, op="push", path="x", name=name)


def test_what_is_no_file_is_refused_without_waiting(agent: Agent, home: Path) -> None:
    os.mkfifo(home / "fifo")
    (home / "link").symlink_to("/etc")
    for path in ("fifo", "link", "missing", "/dev/null", "/proc/self/environ", "/proc/self", "/sys"):
        assert refusal(agent, op="pull", path=path)
    (home / "way").symlink_to("/proc/self")
    assert "neither a file nor a directory" in refusal(agent, op="pull", path="way/environ")
    for path in ("/proc", "way/fd", "missing/x"):
        assert refusal(agent, op="push", path=path, name="x")


def test_no_more_than_some_copies_go_on_at_a_time_and_each_gives_its_place_back(
    agent: Agent, home: Path, tmp_path: Path
) -> None:
    (home / "file").write_text("x")
    under_way = [begin(agent, op="push", path="new") for _ in range(MAX_COPIES)]
    assert f"{MAX_COPIES} copies" in refusal(agent, op="pull", path="file")
    assert agent.ask("hello")[0]["ok"] is True
    under_way[0].sendall(b"x" * 300)  # no tree
    assert answer(under_way[0])[0]["error"] == "malformed"
    for connection in under_way:
        connection.close()
    assert until(lambda: all(pull_granted(agent) for _ in range(MAX_COPIES)), 10)
    assert until(lambda: pull_granted(agent), 10)
    assert pull(agent, "file", tmp_path).files == 1


def pull_granted(agent: Agent) -> bool:
    with agent.connect() as connection:
        connection.sendall(pack({"op": "pull", "path": "file"}))
        return granted(connection)["ok"] is True


def test_a_host_that_hangs_up_leaves_no_half_file(agent: Agent, home: Path) -> None:
    connection = begin(agent, op="push", path="new")
    connection.sendall(HEAD.pack(b"F", 0, 0o644, 0, 0) + LENGTH.pack(PIECE) + bytes(PIECE))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""
    connection.close()
    assert [path.name for path in home.iterdir()] == ["ports"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as somebody else")
def test_trees_are_copied_with_the_rights_of_the_kernels_user_only(home: Path, tmp_path: Path) -> None:
    (home / "roots").mkdir()
    (home / "roots" / "secret").write_text("secret")
    (home / "roots" / "secret").chmod(0o600)
    (home / "closed").mkdir(mode=0o700)
    (home / "his").mkdir()
    os.chown(home / "his", NOBODY, NOBODY)
    (tmp_path / "file").write_text("x")
    with reaped() as children:
        agent = Agent(children, settings_for(home, NOBODY, NOBODY))
        assert pull(agent, "roots", tmp_path).problems == [("copy/secret", 13)]
        assert "Permission denied" in refusal(agent, op="pull", path="closed")
        assert "Permission denied" in refusal(agent, op="pull", path="roots/secret")
        assert push(agent, tmp_path / "file", path="new").problems == [("new", 13)]
        assert push(agent, tmp_path / "file", path="his", name="new").files == 1
        (home / "his" / "roots").symlink_to(home / "roots")
        assert push(agent, tmp_path / "file", path="his/roots/new").problems == [("new", 13)]
    assert (home / "his" / "new").stat().st_uid == NOBODY
    assert os.geteuid() == 0
