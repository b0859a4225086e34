"""Trees of files as a stream: honest ones arrive as they were, others do no harm."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.agent import tree
from sandbox_kernel.agent.tree import (
    BROKEN,
    HEAD,
    LENGTH,
    LINK,
    MAX_DEPTH,
    PIECE,
    SPECIAL,
    TAKEN,
    FormatError,
    Limits,
    Overflow,
    Place,
    Receiver,
    Sender,
    Spoken,
    Tally,
    Wire,
    WireError,
)

SECONDS = 20.0


def open_directory(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def receive(stream: bytes, target: Path, limits: Limits | None = None, name: str = "top") -> Tally:
    """What becomes of a stream that somebody has made, who then hangs up."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            try:
                theirs.sendall(stream)
            except OSError:
                pass

    thread = threading.Thread(target=send)
    thread.start()
    place = Place.at(str(target), name, open_directory)
    try:
        with ours:
            receiver = Receiver(Wire(ours, SECONDS), limits or Limits())
            receiver.receive(place)
            return receiver.tally
    finally:
        thread.join()
        place.close()


def written(source: Path, watch: Callable[[Tally], None] | None = None) -> bytes:
    """The stream of a file or directory."""
    ours, theirs = socket.socketpair()
    stream = bytearray()

    def collect() -> None:
        with theirs:
            while data := theirs.recv(1 << 20):
                stream.extend(data)

    thread = threading.Thread(target=collect)
    thread.start()
    fd = os.open(source, os.O_RDONLY)
    try:
        with ours:
            Sender(Wire(ours, SECONDS), watch).send(fd)
    finally:
        os.close(fd)
        thread.join()
    return bytes(stream)


def copy(source: Path, target: Path, name: str | None = None) -> Tally:
    return receive(written(source), target, None, source.name if name is None else name)


def record(kind: bytes, name: bytes = b"", mode: int = 0o755, mtime: int = 0, size: int = 0) -> bytes:
    return HEAD.pack(kind, len(name), mode, mtime, size) + name


def piece(data: bytes = b"") -> bytes:
    return LENGTH.pack(len(data)) + data


TOP, UP, END = record(b"D"), record(b"U"), record(b"E")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


def test_a_tree_arrives_as_it_was(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "in" / "depth").mkdir(parents=True)
    sizes = (0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 5)
    for size in sizes:
        (source / "in" / str(size)).write_bytes(os.urandom(size))
    (source / "in" / "depth" / "script").write_text("#!/bin/sh\n")
    (source / "in" / "depth" / "script").chmod(0o750)
    Path(os.fsdecode(bytes(source) + b"/not-utf8-\xff")).write_text("x")
    (source / "private").mkdir(mode=0o700)
    os.utime(source / "in" / "depth" / "script", ns=(5, 1_600_000_000_123_456_789))
    os.utime(source / "empty", ns=(5, 1_500_000_000_000_000_001))
    tally = copy(source, target)
    made = target / "source"
    assert sorted(p.relative_to(made) for p in made.rglob("*")) == sorted(
        p.relative_to(source) for p in source.rglob("*")
    )
    for path in source.rglob("*"):
        found, wanted = (made / path.relative_to(source)).stat(), path.stat()
        assert (found.st_mode, found.st_mtime_ns) == (wanted.st_mode, wanted.st_mtime_ns), path
        if path.is_file():
            assert (made / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert (tally.files, tally.directories, tally.size) == (len(sizes) + 2, 5, sum(sizes) + 11)
    assert (tally.problems, tally.failed, tally.unlisted) == ([], 0, 0)


def test_of_the_mode_permission_bits_arrive_and_no_more_than_the_umask_leaves(
    tmp_path: Path, target: Path
) -> None:
    (tmp_path / "tool").write_text("x")
    (tmp_path / "tool").chmod(0o6757)
    before = os.umask(0o027)
    try:
        copy(tmp_path / "tool", target)
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "tool").stat().st_mode) == 0o750


def test_a_directory_that_nobody_may_write_to_is_filled_all_the_same(tmp_path: Path, target: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    (tmp_path / "source").chmod(0o555)
    assert copy(tmp_path / "source", target).failed == 0
    assert stat.S_IMODE((target / "source").stat().st_mode) == 0o555
    assert (target / "source" / "file").read_text() == "x"


def test_links_and_special_files_are_left_out_and_named(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "link").symlink_to("../secret")
    (source / "folder").symlink_to("..")
    os.mkfifo(source / "fifo")
    (source / "file").write_text("x")
    tally = copy(source, target)
    assert sorted(tally.problems) == [
        ("source/fifo", SPECIAL),
        ("source/folder", LINK),
        ("source/link", LINK),
    ]
    assert tally.failed == 0
    assert [path.name for path in (target / "source").iterdir()] == ["file"]


def test_links_in_the_target_are_neither_followed_nor_replaced(tmp_path: Path, target: Path) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "file").write_text("new")
    (source / "file").write_text("new")
    (source / "dangling").write_text("new")
    (source / "fine").write_text("new")
    outside.mkdir()
    (outside / "file").write_text("old")
    made = target / "source"
    made.mkdir()
    (made / "folder").symlink_to(outside)
    (made / "file").symlink_to(outside / "file")
    (made / "dangling").symlink_to(outside / "new")
    tally = copy(source, target)
    assert sorted(tally.problems) == [(f"source/{each}", TAKEN) for each in ("dangling", "file", "folder")]
    assert tally.failed == 3
    assert (tally.files, tally.size) == (1, 3)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("file", "old")]
    assert sorted(path.name for path in made.iterdir() if path.is_symlink()) == ["dangling", "file", "folder"]
    assert (made / "fine").read_text() == "new"


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_replaces_a_file_and_a_directory_is_filled_up(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        # What a Linux sees that does not know the flag, and refuses.
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    source = tmp_path / "source"
    (source / "kept").mkdir(parents=True)
    for name in ("kept/new", "replaced", "is-a-folder"):
        (source / name).write_text("new")
    made = target / "source"
    (made / "kept").mkdir(parents=True)
    (made / "is-a-folder").mkdir()
    (made / "kept" / "old").write_text("old")
    (made / "replaced").write_text("much older")
    with (made / "replaced").open() as reader:
        tally = copy(source, target)
        assert reader.read() == "much older"
    assert tally.problems == [("source/is-a-folder", 21)]
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*"))
    assert names == ["is-a-folder", "kept", "kept/new", "kept/old", "replaced"]
    assert (made / "replaced").read_text() == "new"


def test_a_directory_does_not_replace_a_file(tmp_path: Path, target: Path) -> None:
    (tmp_path / "source" / "in").mkdir(parents=True)
    (tmp_path / "source" / "in" / "file").write_text("new")
    (target / "source").write_text("old")
    tally = copy(tmp_path / "source", target)
    assert (tally.problems, tally.files) == ([("source", 20)], 0)
    assert (target / "source").read_text() == "old"


@pytest.mark.parametrize(
    ("path", "name", "made"),
    [
        ("there", "source", "there/source/file"),
        ("there/", "source", "there/source/file"),
        ("new", "source", "new/file"),
        ("new/", "source", "new/file"),
        ("there/new", "source", "there/new/file"),
        ("there", "", "there/file"),
        ("new", "", "new/file"),
    ],
)
def test_a_directory_goes_where_cp_would_put_it(tmp_path: Path, path: str, name: str, made: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    (tmp_path / "place" / "there").mkdir(parents=True)
    stream = written(tmp_path / "source")
    place = f"{tmp_path}/place/{path}"
    assert receive(stream, place, None, name).failed == 0  # type: ignore[arg-type]
    assert (tmp_path / "place" / made).read_text() == "x"


@pytest.mark.parametrize(
    ("path", "made"),
    [("there", "there/source"), ("new", "new"), ("file", "file"), ("new/", None), ("file/", None)],
)
def test_a_file_goes_where_cp_would_put_it(tmp_path: Path, path: str, made: str | None) -> None:
    (tmp_path / "source").write_text("new")
    (tmp_path / "place" / "there").mkdir(parents=True)
    (tmp_path / "place" / "file").write_text("old")
    place = f"{tmp_path}/place/{path}"
    tally = receive(written(tmp_path / "source"), place, None, "source")  # type: ignore[arg-type]
    if made is None:
        assert [reason for _, reason in tally.problems] == [20]
        assert (tmp_path / "place" / "file").read_text() == "old"
        assert not (tmp_path / "place" / "new").exists()
    else:
        assert (tmp_path / "place" / made).read_text() == "new"


@pytest.mark.parametrize("path", ["none/new", "file/new", "none/.."])
def test_where_no_directory_is_nothing_is_put(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"No such file|Not a directory"):
        Place.at(f"{tmp_path}/{path}", "name", open_directory)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_copy_that_breaks_off_leaves_no_half_file(
    target: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    begun = TOP + record(b"F", b"whole") + piece(b"x") + record(b"F", b"half") + piece(bytes(PIECE))
    with pytest.raises(WireError, match="hung up"):
        receive(begun, target)
    assert [path.name for path in (target / "top").iterdir()] == ["whole"]


def test_a_file_that_its_sender_cannot_read_to_its_end_is_left_out(target: Path) -> None:
    stream = TOP + record(b"F", b"bad") + piece(bytes(PIECE)) + LENGTH.pack(BROKEN + 5)
    tally = receive(stream + record(b"F", b"good") + piece(b"x") + UP + END, target)
    assert (tally.problems, tally.failed, tally.files, tally.size) == ([("top/bad", 5)], 1, 1, 1)
    assert [path.name for path in (target / "top").iterdir()] == ["good"]


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/etc", b"a\0b", b"", b"../../x"])
@pytest.mark.parametrize("kind", [b"F", b"D", b"S"])
def test_a_name_that_is_none_ends_the_copy(target: Path, name: bytes, kind: bytes) -> None:
    if kind == b"S" and not name:
        return  # the directory itself, of which the rest could not be read
    with pytest.raises(FormatError, match="a file named"):
        receive(TOP + record(kind, name) + piece(b"x") + UP + UP + END, target)
    assert not list((target / "top").iterdir())


@pytest.mark.parametrize(
    "stream",
    [
        END,
        UP,
        record(b"D", b".bashrc"),
        record(b"F", b".bashrc") + piece(b"x") + END,
        record(b"S", b"x"),
        TOP + UP + TOP,
        TOP + UP + record(b"F", b"another") + piece(b"x") + END,
        record(b"F") + piece(b"x") + record(b"F") + piece(b"y") + END,
        TOP + END,
        TOP + record(b"X", b"x"),
        record(b"F") + LENGTH.pack(PIECE + 1),
        TOP + record(b"D", b"d") * MAX_DEPTH,
    ],
)
def test_what_is_no_tree_ends_the_copy(target: Path, stream: bytes) -> None:
    with pytest.raises(FormatError):
        receive(stream + bytes(4096), target)
    assert {path.name for path in target.iterdir()} <= {"top"}


def test_the_senders_name_for_the_top_does_not_count(tmp_path: Path, target: Path) -> None:
    (tmp_path / ".profile").write_text("x")
    copy(tmp_path / ".profile", target, "report.txt")
    assert [path.name for path in target.iterdir()] == ["report.txt"]


def test_more_bytes_than_allowed_end_the_copy(target: Path) -> None:
    endless = record(b"F", size=5) + (LENGTH.pack(PIECE) + bytes(PIECE)) * 9
    with pytest.raises(Overflow, match="size"):
        receive(endless, target, Limits(size=8 * PIECE))
    assert not list(target.iterdir())


def test_bytes_that_cannot_be_kept_count_too(target: Path) -> None:
    (target / "top").mkdir()
    (target / "top" / "taken").mkdir()
    refused = record(b"F", b"taken") + piece(bytes(1000))
    with pytest.raises(Overflow, match="size"):
        receive(TOP + refused * 9, target, Limits(size=8000))


@pytest.mark.parametrize(
    "entry", [record(b"F", b"a") + piece(), record(b"D", b"a") + UP, record(b"S", b"a"), record(b"S")]
)
def test_more_entries_than_allowed_end_the_copy(target: Path, entry: bytes) -> None:
    with pytest.raises(Overflow, match="entries"):
        receive(TOP + entry * 10, target, Limits(entries=10))


def test_of_many_problems_the_first_are_named_and_all_counted(target: Path) -> None:
    tally = receive(TOP + b"".join(record(b"S", b"%d" % n, 13) for n in range(200)) + UP + END, target)
    assert len(tally.problems) == tree.MAX_PROBLEMS
    assert (tally.unlisted, tally.failed) == (200 - tree.MAX_PROBLEMS, 200)


def test_directories_deeper_than_allowed_are_left_out_by_the_sender(tmp_path: Path, target: Path) -> None:
    deep = tmp_path / "source"
    for _ in range(MAX_DEPTH + 5):
        deep /= "d"
    deep.mkdir(parents=True)
    tally = copy(tmp_path / "source", target)
    assert [reason for _, reason in tally.problems] == [tree.DEEP]
    assert tally.directories == MAX_DEPTH


def test_a_peer_that_stands_still_is_not_waited_for_for_ever(target: Path) -> None:
    ours, theirs = socket.socketpair()
    place = Place.at(str(target), "top", open_directory)
    with ours, theirs:
        theirs.sendall(record(b"F") + LENGTH.pack(100) + b"x")
        with pytest.raises(WireError, match="timed out"):
            Receiver(Wire(ours, 0.2), Limits()).receive(place)
        with pytest.raises(WireError, match="timed out"):
            Wire(ours, 0.2).put(bytes(100 << 20))
    place.close()
    assert not list(target.iterdir())


def test_a_sender_that_heeds_its_peer_stops_when_that_speaks(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(4 * PIECE))
    ours, theirs = socket.socketpair()
    fd = os.open(tmp_path / "large", os.O_RDONLY)
    with ours, theirs:
        theirs.sendall(b"no room")
        with pytest.raises(Spoken):
            Sender(Wire(ours, SECONDS, heed=True)).send(fd)
    os.close(fd)


def test_who_watches_is_told_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(2 * PIECE + 1))
    seen: list[tuple[int, int]] = []
    written(tmp_path / "large", lambda tally: seen.append((tally.size, tally.expected)))
    assert seen == [(n, 2 * PIECE + 1) for n in (PIECE, 2 * PIECE, 2 * PIECE + 1)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


RECORDS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        record,
        st.sampled_from([b"D", b"F", b"S", b"U", b"E", b"D"]),
        st.one_of(st.binary(max_size=255), st.sampled_from([b"", b"a", b"b", b"..", b"a/b"])),
        st.integers(0, 0xFFFF),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 2**64 - 1),
    ),
    st.builds(piece, st.binary(max_size=100)),
    st.builds(LENGTH.pack, st.integers(0, 2**32 - 1)),
)


@given(st.lists(RECORDS, max_size=30), st.booleans())
def test_whatever_comes_nothing_is_touched_outside_the_target(records: list[bytes], begun: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "target").mkdir()
        (folder / "outside").write_text("old")
        (folder / "target" / "top").mkdir()
        (folder / "target" / "top" / "a").symlink_to("../../outside")
        (folder / "target" / "top" / "b").symlink_to("../..")
        before = names(folder)
        stream = (TOP if begun else b"") + b"".join(records)
        try:
            receive(stream, folder / "target", Limits(10_000, 100))
        except (FormatError, WireError, Overflow):
            pass
        assert names(folder) == before
        assert (folder / "outside").read_text() == "old"
        assert names(folder / "target") == ["top"]
