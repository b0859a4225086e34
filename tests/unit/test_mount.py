"""What a mount is written as, where it may lie, and which path of the host is behind one of the guest."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.mount import Mount, check, fill_in, host_path, parse, places


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/data:/data", Mount(PurePosixPath("/data"), PurePosixPath("/data"))),
        ("/data:/data:ro", Mount(PurePosixPath("/data"), PurePosixPath("/data"))),
        ("/a b/c:/d e:rw", Mount(PurePosixPath("/a b/c"), PurePosixPath("/d e"), True)),
        ("//a/../b/:/x//y/.", Mount(PurePosixPath("/b"), PurePosixPath("/x/y"))),
        (
            "/a:/b:rw,written=5,files=7",
            Mount(PurePosixPath("/a"), PurePosixPath("/b"), True, 5 << 20, 7),
        ),
        ("/a:/b:rw,written=0", Mount(PurePosixPath("/a"), PurePosixPath("/b"), True)),
    ],
)
def test_what_is_written_is_what_is_mounted(text: str, mount: Mount) -> None:
    assert parse(text) == mount
    assert parse(str(mount)) == mount


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("/a", "'/a' is no mount; write SOURCE:TARGET or SOURCE:TARGET:rw, both absolute paths."),
        ("a:/b", "'a:/b' is no mount; write SOURCE:TARGET or SOURCE:TARGET:rw, both absolute paths."),
        ("{cwd}:/b", "'{cwd}:/b' is no mount; write SOURCE:TARGET or SOURCE:TARGET:rw, both absolute paths."),
        (
            "/a:/b:wr",
            "The mount of /a has the option 'wr'; allowed are ro, rw, written=MiB and files=NUMBER.",
        ),
        (
            "/a:/b:written=x",
            "The mount of /a has the option 'written=x'; allowed are ro, rw, written=MiB and files=NUMBER.",
        ),
        (
            "/a:/etc/x",
            "/a cannot be mounted on /etc/x, which the guest's system needs; choose another path, "
            "such as /data.",
        ),
        (
            "/a:/data/..",
            "/a cannot be mounted on /, which the guest's system needs; choose another path, such as /data.",
        ),
        ("/b/..:/data", "The host's root cannot be mounted; name a directory below it."),
        (f"/a:/{'b' * 1100}", f"The path /{'b' * 79}… has over 1024 characters; use a shorter one."),
    ],
)
def test_what_is_no_mount_is_refused_with_what_is(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == sentence


def test_two_directories_at_one_place_are_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check([parse("/a:/x"), parse("/b:/x/")], None)
    assert str(caught.value) == "Two directories are to be mounted on /x; give each a path of its own."


@pytest.mark.parametrize(
    ("roots", "text"),
    [
        ((), "/a:/x"),
        (("/b",), "/a:/x"),
        (("/a:ro",), "/a/b:/x:rw"),
        (("/a/b",), "/a:/x"),
        (("/a",), "/a/../b:/x"),
        (("/a",), "/ab:/x"),
    ],
)
def test_an_administrators_roots_bind(roots: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check([parse(text)], roots)
    mount = parse(text)
    how = "read-write" if mount.writable else "read-only"
    assert str(caught.value) == (
        f"{mount.source} is to be mounted {how}, and the administrator allows mounts below: "
        f"{', '.join(roots) or 'none'} (mount_roots); choose a directory there."
    )


def test_what_lies_below_a_root_is_allowed() -> None:
    check([parse("/a/b:/x:rw"), parse("/c:/y")], ("/a", "/c:ro"))
    check([parse("/anything:/x:rw")], None)


def test_places_are_filled_in() -> None:
    found = places("/home/me", "/work/book/note.ipynb")
    assert fill_in(("{cwd}:{notebook_dir}/x:rw", "/a:/b"), found) == ("/home/me:/work/book/x:rw", "/a:/b")


@pytest.mark.parametrize(
    ("cwd", "session", "expected"),
    [
        ("/home/me/", "", ("/home/me", "/home/me")),
        (Path("/home/me"), "note.ipynb", ("/home/me", "/home/me")),
        (None, "", (str(Path.cwd()), str(Path.cwd()))),
        ("sub/..", "", (str(Path.cwd()), str(Path.cwd()))),
        ("/home/me", "/work/a/../b/note.ipynb", ("/home/me", "/work/b")),
    ],
)
def test_a_client_names_its_directory_in_many_ways(
    cwd: object, session: str, expected: tuple[str, str]
) -> None:
    assert places(cwd, session) == {"cwd": expected[0], "notebook_dir": expected[1]}


def test_a_directory_whose_name_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        fill_in(("{cwd}:{cwd}",), places("/a:b", ""))
    assert str(caught.value) == (
        "The directory /a:b cannot be mounted, as its name has a `:` or `{`; rename it."
    )


def test_a_guests_path_is_the_hosts_in_the_innermost_mount() -> None:
    mounts = [parse("/host:/data"), parse("/other:/data/deep:rw")]
    assert host_path(mounts, "/data/file") == "/host/file"
    assert host_path(mounts, "/data/deep/file") == "/other/file"
    assert host_path(mounts, "/data/deeper") == "/host/deeper"
    assert host_path(mounts, "/data/../etc/passwd") is None
    assert host_path(mounts, "relative") is None
    assert host_path([], "/data") is None
