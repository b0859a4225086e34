"""Copies between this host and a VM: through a real window, with a real agent, and with guests that lie."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guest_agent import Agent, reaped, settings_for, short_folder

from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.agent.protocol import pack
from sandbox_kernel.agent.tree import HEAD, LENGTH, PIECE
from sandbox_kernel.errors import ConfigurationError, GuestError, GuestProtocolError, LimitExceeded
from sandbox_kernel.supervisor import copies, remote, remote_copy
from sandbox_kernel.supervisor.remote_copy import Copied, name_of, pull, push
from sandbox_kernel.supervisor.window import Handover, Window
from tests.microvm import until

TOP = HEAD.pack(b"D", 0, 0o755, 0, 0)
GRANTED = pack({"ok": True})


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runtime folder, with a VM's folder in it."""
    with short_folder() as folder:
        monkeypatch.setattr(remote.paths, "runtime_dir", lambda: folder)
        (folder / "vm1").mkdir()
        yield folder


async def opened(runtime: Path, connect: Callable[[], socket.socket]) -> Window:
    """The window of a VM whose agent is at the other end of what `connect` makes."""

    async def connect_agent(timeout: float) -> AgentClient:
        connection = connect()
        connection.setblocking(False)
        return AgentClient(connection)

    machine: Any = SimpleNamespace(connect_agent=connect_agent)

    async def copy(request: Mapping[str, Any]) -> Handover:
        return Handover(await copies.begin(machine, request))

    window = Window(runtime / "vm1", {"copy": copy})
    await window.open()
    return window


@pytest.fixture
async def vm(home: Path, runtime: Path) -> AsyncIterator[Path]:
    """A VM with an honest agent; its home."""
    with reaped() as children:
        agent = Agent(children, settings_for(home))
        window = await opened(runtime, agent.connect)
        yield home
        await window.aclose()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


async def called(function: Callable[..., Copied], *arguments: Any, **more: Any) -> Copied:
    return await asyncio.to_thread(function, *arguments, **more)


async def lied_to(
    runtime: Path, said: bytes, function: Callable[..., Copied], *arguments: Any, **more: Any
) -> Copied:
    """What comes of a copy with a guest that says what it likes, reads all it is sent, and hangs up."""

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()

        def speak() -> None:
            with theirs:
                theirs.settimeout(20)
                try:
                    theirs.sendall(said)
                    theirs.shutdown(socket.SHUT_WR)
                    while theirs.recv(1 << 20):
                        pass
                except OSError:
                    pass

        threading.Thread(target=speak, daemon=True).start()
        return ours

    window = await opened(runtime, connect)
    try:
        return await called(function, *arguments, **more)
    finally:
        await window.aclose()


async def test_a_tree_goes_there_and_back(vm: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in" / "empty").mkdir(parents=True)
    (source / "in" / "file").write_bytes(os.urandom(3 * PIECE))
    (source / "link").symlink_to("/etc/passwd")
    before = descriptors()
    there = await called(push, "vm", str(source), "")
    assert (there.files, there.directories, there.size, there.failed) == (1, 3, 3 * PIECE, 0)
    assert there.left_out == ("source/link: is a link, which is not followed",)
    back = await called(pull, "vm1", "source/.", str(tmp_path / "back"))
    assert (back.files, back.directories, back.size, back.left_out) == (1, 3, 3 * PIECE, ())
    assert (tmp_path / "back/in/file").read_bytes() == (source / "in/file").read_bytes()
    assert (tmp_path / "back/in/empty").is_dir()
    assert until(lambda: descriptors() <= before, 10)


async def test_what_the_guest_refuses_is_told_as_it_says_it(vm: Path, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"No such file or directory: .*/nothing"):
        await called(pull, "vm1", "nothing", str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(GuestError, match="No such file or directory"):
        await called(push, "vm1", str(tmp_path / "file"), "none/new")


async def test_a_link_on_the_host_is_named_with_where_it_leads(vm: Path, tmp_path: Path) -> None:
    (vm / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for path in ("link", "link/", "link/.", "link/new"):
        for copy, arguments in (
            (pull, ("vm1", "file", f"{tmp_path}/{path}")),
            (push, ("vm1", f"{tmp_path}/{path}", "here")),
        ):
            with pytest.raises(ConfigurationError, match=rf"leads over a link \(link\).*{tmp_path}/folder"):
                await called(copy, *arguments)
    assert not list((tmp_path / "folder").iterdir())
    assert not (vm / "here").exists()


async def test_nothing_is_no_path(vm: Path) -> None:
    (vm / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="No such file"):
        await called(pull, "vm1", "file", "")
    with pytest.raises(ConfigurationError, match="No such file"):
        await called(push, "vm1", "", "x")


@pytest.mark.parametrize("path", ["missing", "fifo", "file/", "file/."])
async def test_what_cannot_be_copied_is_named(vm: Path, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=f"{path} cannot be copied"):
        await called(push, "vm1", f"{tmp_path}/{path}", "x")
    assert not (vm / "x").exists()


async def test_a_place_without_a_directory_is_named(vm: Path, tmp_path: Path) -> None:
    (vm / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=r"none/new is no place for a copy \(No such file"):
        await called(pull, "vm1", "file", f"{tmp_path}/none/new")


async def test_bounds_of_what_is_pulled_are_told_with_the_option_that_raises_them(
    vm: Path, tmp_path: Path
) -> None:
    (vm / "file").write_bytes(bytes(3 << 20))
    with pytest.raises(LimitExceeded, match=r"more than 2 MiB.*--max-size"):
        await called(pull, "vm1", "file", str(tmp_path), 2 << 20)
    with pytest.raises(LimitExceeded, match=r"more than 2 files.*--max-files"):
        await called(pull, "vm1", ".", str(tmp_path / "new"), max_files=2)
    assert not (tmp_path / "file").exists()


def test_a_full_file_system_of_the_host_is_told_once_and_by_name(tmp_path: Path) -> None:
    script = """
import pathlib, socket, sys, threading
from sandbox_kernel.agent.tree import HEAD, LENGTH
from sandbox_kernel.supervisor import remote_copy
ours, theirs = socket.socketpair()
file = HEAD.pack(b"F", 1, 0o644, 0, 0) + b"%d" + LENGTH.pack(50000) + bytes(50000)
tree = HEAD.pack(b"D", 0, 0o755, 0, 0) + b"".join(file % number for number in range(3))
threading.Thread(target=theirs.sendall, args=(tree,)).start()
remote_copy.find = lambda vm: pathlib.Path("/runtime/vm1/control")
remote_copy.ask_for_connection = lambda window, request: ours
try:
    remote_copy.pull("vm1", "data", sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
print([str(path.relative_to(sys.argv[1])) for path in pathlib.Path(sys.argv[1]).rglob("*")])
"""
    run = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run, "sh", str(tmp_path), sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == (
        f"NoSpaceError There is no room for the copy in {tmp_path} (No space left on device); remove files "
        "there, or choose another place.\n['data', 'data/0']\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("stream", "error", "said"),
    [
        (b"", GuestError, "broke off"),
        (TOP, GuestError, "broke off"),
        (TOP + HEAD.pack(b"F", 8, 0o644, 0, 0) + b"../steal" + LENGTH.pack(0), GuestProtocolError, "steal"),
        (TOP + HEAD.pack(b"F", 5, 0o644, 0, 0) + b"\x1b/\n[m" + LENGTH.pack(0), GuestProtocolError, "named"),
        (b"\0" * 4096, GuestProtocolError, "neither a file nor a directory"),
    ],
)
async def test_a_guest_that_lies_in_a_pull_does_no_harm(
    runtime: Path, tmp_path: Path, stream: bytes, error: type[Exception], said: str
) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(error, match=said) as caught:
        await lied_to(runtime, GRANTED + stream, pull, "vm1", "data", str(tmp_path / "target"))
    assert str(caught.value).isprintable()
    assert names(tmp_path) <= {"target", "data"}


async def test_names_of_a_guest_reach_people_as_printable_text(runtime: Path, tmp_path: Path) -> None:
    name = b"\x1b[2J\xff\xe2\x80\xaex"
    stream = TOP + HEAD.pack(b"S", len(name), 13, 0, 0) + name
    stream += HEAD.pack(b"U", 0, 0, 0, 0) + HEAD.pack(b"E", 0, 0, 0, 0)
    copied = await lied_to(runtime, GRANTED + stream, pull, "vm1", "data", str(tmp_path))
    assert copied.left_out == ("data/ [2J x: Permission denied",)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (b"", GuestError, "broke off"),
        (pack({"ok": True}), GuestProtocolError, "before its end|no usable"),
        (pack({"ok": False, "error": "failed", "message": "No\x1b room."}), GuestError, "No room."),
        (pack({"ok": False}), GuestProtocolError, "no usable"),
        (pack({"ok": True}, b"more"), GuestProtocolError, "nobody asked for"),
        (b"HTTP/1.1 200 OK", GuestProtocolError, "begins with"),
    ],
)
async def test_a_guest_that_lies_in_a_push_is_told_of(
    runtime: Path, tmp_path: Path, answer: bytes, error: type[Exception], said: str
) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PIECE))
    with pytest.raises(error, match=said):
        await lied_to(runtime, GRANTED + answer, push, "vm1", str(tmp_path / "file"), "x")


@pytest.mark.parametrize(
    "fields", [{}, {"problems": [[1, 2]]}, {"problems": [["a", -1]] * 60}, {"files": -1}]
)
async def test_a_tally_that_is_none_is_the_guests_fault(
    runtime: Path, tmp_path: Path, fields: dict[str, object]
) -> None:
    (tmp_path / "empty").touch()
    count = dict.fromkeys(("files", "directories", "size", "failed", "unlisted"), 0)
    answer = pack({"ok": True, **count, **fields})

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()

        def speak() -> None:
            with theirs:
                theirs.sendall(GRANTED)
                heard = b""
                while not heard.endswith(HEAD.pack(b"E", 0, 0, 0, 0)):
                    heard += theirs.recv(1 << 16)
                theirs.sendall(answer)

        threading.Thread(target=speak, daemon=True).start()
        return ours

    window = await opened(runtime, connect)
    with pytest.raises(GuestProtocolError, match="no usable"):
        await called(push, "vm1", str(tmp_path / "empty"), "x")
    await window.aclose()


@pytest.mark.parametrize(
    "request_", [{}, {"to": "host"}, {"to": "moon", "path": "x"}, {"to": "guest", "path": "x", "name": 5}]
)
async def test_a_malformed_request_is_refused(vm: Path, runtime: Path, request_: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        await asyncio.to_thread(remote.ask, remote.find("vm1"), {"op": "copy", **request_})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("a/b", "b"), ("a/b//", "b"), ("b", "b"), ("/", ""), ("", ""), (".", ""), ("a/.", "")),
        *(("a/..", ""), ("a/./", ""), ("a/...", "...")),
    ],
)
def test_a_copy_is_called_like_what_it_is_a_copy_of(path: str, name: str) -> None:
    assert name_of(path) == name


def test_the_most_that_a_guest_may_send_is_what_the_documents_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    assert f"{remote_copy.MAX_SIZE >> 30} GiB" in text
    assert f"{remote_copy.MAX_FILES // 1_000_000} million files" in text
