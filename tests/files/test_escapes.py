"""A guest that is root and speaks 9p by itself never gets outside of the directory that is mounted."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.files.conftest import Serve
from tests.files.nine import ROOT, Client, Refused

SECRET = b"the host's secret"


def test_what_the_guest_writes_belongs_to_the_user_and_what_the_user_writes_is_the_guests(
    serve: Serve, place: Path, user: int
) -> None:
    client = serve()
    client.write(client.create("made"), b"by the guest")
    found = (place / "shared" / "made").stat()
    assert (found.st_uid, (place / "shared" / "made").read_bytes()) == (user, b"by the guest")
    (place / "shared" / "host").write_text("by the host")
    os.chown(place / "shared" / "host", user, user)
    fid = client.walk("host")
    assert client.owner(fid) == (1000, 1000)
    assert client.read(client.open(fid)) == b"by the host"


@pytest.mark.parametrize(
    "names", [("..", "outside", "secret"), ("../outside/secret",), ("..", "..", "etc", "passwd")]
)
def test_dot_dot_does_not_lead_out(serve: Serve, names: tuple[str, ...]) -> None:
    client = serve()
    try:
        found = client.content(*names)
    except (Refused, FileNotFoundError):
        return
    assert SECRET not in found
    assert b"root:" not in found


@pytest.mark.parametrize(
    "name", ["../outside/made", "../made", "/made", "a/../../outside/made", "a/../../made", "..", "."]
)
def test_a_name_with_a_path_in_it_makes_nothing_outside(serve: Serve, place: Path, name: str) -> None:
    client = serve()
    client.mkdir("a")
    for make in (client.create, client.mkdir, lambda name: client.symlink(name, "x")):
        with suppress(Refused):
            make(name)
    assert [path.name for path in (place / "outside").iterdir()] == ["secret"]
    inside = {"made"} if name == "/made" else set()  # which is taken for a name in the directory
    assert {path.name for path in (place / "shared").iterdir()} == {"a", *inside}


def test_a_link_to_the_host_leads_nowhere(serve: Serve, place: Path) -> None:
    client = serve()
    for name, target in {
        "absolute": str(place / "outside" / "secret"),
        "relative": "../outside/secret",
        "folder": str(place / "outside"),
        "proc": "/proc/self/root",
        "root": "/",
    }.items():
        client.symlink(name, target)
    for way in (
        ("absolute",),
        ("relative",),
        ("folder", "secret"),
        ("proc", "etc"),
        ("root", "etc", "shadow"),
    ):
        with pytest.raises((Refused, FileNotFoundError)):
            client.content(*way)


def test_a_path_swapped_for_a_link_while_it_is_opened_never_shows_the_outside(
    serve: Serve, place: Path
) -> None:
    client, over, swaps = serve(), threading.Event(), 0
    shared = place / "shared"
    (shared / "real").mkdir()
    (shared / "real" / "secret").write_text("harmless")
    (shared / "link").symlink_to(place / "outside")
    now = shared / "now"

    def swap() -> None:
        nonlocal swaps
        while not over.is_set():
            for name in ("real", "link"):
                (shared / name).rename(now)
                now.rename(shared / name)
            swaps += 1

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = []
    try:
        for _ in range(2000):
            with suppress(Refused, FileNotFoundError):
                seen.append(client.content("now", "secret"))
    finally:
        over.set()
        swapper.join()
    assert set(seen) == {b"harmless"}
    assert swaps > 100


def test_a_directory_moved_out_by_the_host_takes_nobody_along(serve: Serve, place: Path) -> None:
    client = serve()
    client.mkdir("moved")
    inside = client.walk("moved")
    (place / "shared" / "moved").rename(place / "outside" / "moved")
    with pytest.raises((Refused, FileNotFoundError)):
        client.read(client.open(client.walk("..", "secret", at=inside)))


@pytest.mark.parametrize(
    ("kind", "major", "minor"), [(stat.S_IFCHR, 1, 3), (stat.S_IFCHR, 1, 1), (stat.S_IFBLK, 7, 0)]
)
def test_no_device_node_can_be_made(serve: Serve, kind: int, major: int, minor: int) -> None:
    with pytest.raises(Refused) as caught:
        serve().mknod("device", kind | 0o666, major, minor)
    assert caught.value.errno == errno.EPERM


def test_a_socket_of_the_host_cannot_be_spoken_to(serve: Serve, place: Path, user: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "shared" / "socket"))
        listener.listen()
        os.chown(place / "shared" / "socket", user, user)
        client = serve()
        with pytest.raises(Refused):
            client.open(client.walk("socket"), os.O_RDWR)


def test_a_hard_link_has_to_stay_inside(serve: Serve, place: Path) -> None:
    client = serve()
    client.write(client.create("file"), b"x")
    with pytest.raises(Refused):
        client.link(client.walk("file"), "../outside/linked")
    client.symlink("link", str(place / "outside" / "secret"))
    client.link(client.walk("link"), "hard")
    with pytest.raises((Refused, FileNotFoundError)):
        client.content("hard")
    assert (place / "outside" / "secret").stat().st_nlink == 1


def test_a_rename_has_to_stay_inside(serve: Serve, place: Path) -> None:
    client = serve()
    client.create("file")
    for new in ("../outside/file", "/file", str(place / "outside" / "file")):
        with pytest.raises(Refused):
            client.rename("file", new)
    for old in ("../outside/secret", str(place / "outside" / "secret")):
        with pytest.raises(Refused):
            client.rename(old, "stolen")
    assert [path.name for path in (place / "outside").iterdir()] == ["secret"]


def test_another_directory_cannot_be_asked_for(serve: Serve, place: Path) -> None:
    for directory in ("/", "/share/..", "/usr", "/proc", str(place / "outside")):
        client = Client(serve().socket)
        with pytest.raises(Refused):
            client.attach(directory)


def test_what_is_mounted_read_only_stays_as_it_is(serve: Serve, place: Path, user: int) -> None:
    (place / "shared" / "file").write_text("as it was")
    os.chown(place / "shared" / "file", user, user)
    client = serve("ro")
    fid = client.walk("file")
    for attempt in (
        lambda: client.open(client.walk("file"), os.O_RDWR),
        lambda: client.open(client.walk("file"), os.O_RDONLY | os.O_TRUNC),
        lambda: client.truncate(fid, 0),
        lambda: client.create("new"),
        lambda: client.mkdir("new"),
        lambda: client.symlink("new", "x"),
        lambda: client.link(fid, "new"),
        lambda: client.rename("file", "new"),
        lambda: client.unlink("file"),
        lambda: client.mknod("new", stat.S_IFIFO | 0o644),
    ):
        with pytest.raises(Refused) as caught:
            attempt()
        assert caught.value.errno in (errno.EROFS, errno.EOPNOTSUPP)
    assert [(path.name, path.read_text()) for path in (place / "shared").iterdir()] == [("file", "as it was")]


def test_what_keeps_kernels_apart_is_not_shown(serve: Serve, place: Path, user: int) -> None:
    (hidden := place / "shared" / "data" / "kernels").mkdir(parents=True)
    (hidden / "template").write_text("of all kernels")
    client = serve(masked=(hidden,))
    with pytest.raises((Refused, FileNotFoundError)):
        client.content("data", "kernels", "template")
    with pytest.raises(Refused) as caught:
        client.create("template", at=client.walk("data", "kernels"))
    assert caught.value.errno == errno.EROFS
    assert (hidden / "template").read_text() == "of all kernels"


def test_it_sees_no_process_and_no_network(serve: Serve) -> None:
    client = serve()
    [server] = [p for p in client.process.children(recursive=True) if p.name() == "diod"]  # type: ignore[attr-defined]
    for kind in ("net", "pid", "mnt", "user", "ipc"):
        assert Path(f"/proc/{server.pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_what_a_guest_has_the_server_remember_and_hold_open_is_bounded(serve: Serve) -> None:
    client = serve()
    [server] = [p for p in client.process.children(recursive=True) if p.name() == "diod"]  # type: ignore[attr-defined]
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    assert re.search(rf"Max data size +{192 << 20} +{192 << 20} ", limits)
    client.create("file")
    with pytest.raises(Refused) as caught:
        for _ in range(2000):
            client.open(client.walk("file"))
    assert caught.value.errno == errno.EMFILE


def test_a_server_dies_of_nonsense_alone(serve: Serve) -> None:
    client = serve()
    client.socket.sendall(b"\xff" * 64)
    with pytest.raises(OSError):
        client.walk()
    serve().walk(at=ROOT)
