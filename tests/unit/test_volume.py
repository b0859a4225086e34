"""What a volume is written as, and where it may lie."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from sandbox_kernel import mount
from sandbox_kernel.agent.protocol import MAX_VOLUMES
from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.spec import VMSpec, placed, resolve
from sandbox_kernel.volume import MOST, Volume, check, parse


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("data:/data", Volume("data", PurePosixPath("/data"))),
        ("data:/data:ro", Volume("data", PurePosixPath("/data"))),
        ("a.b_c-1:/a b//c/../d:rw", Volume("a.b_c-1", PurePosixPath("/a b/d"), True)),
        ("0" * 64 + ":/x", Volume("0" * 64, PurePosixPath("/x"))),
    ],
)
def test_what_is_written_is_what_is_attached(text: str, volume: Volume) -> None:
    assert parse(text) == volume
    assert parse(str(volume)) == volume


@pytest.mark.parametrize(
    "text",
    [
        *("data", "data:", "data:x", ":/x", "../x:/x", ".x:/x", "Data:/x", "a/b:/x", "0" * 65 + ":/x"),
        *("a:/x:wr", "a:/x:rw,", "a:{cwd}", "a:/x\0", "a\n:/x"),
    ],
)
def test_what_is_no_volume_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"{text!r} is no volume; write NAME:TARGET or NAME:TARGET:rw, with a name of up to 64 lower-case "
        "letters, digits, `_`, `.` and `-`, and an absolute path."
    )
    with pytest.raises(ConfigurationError):
        resolve([("kernel.json", {"volumes": [text]})])


@pytest.mark.parametrize("target", ["/", "/etc", "/usr/lib", "/data/../proc"])
def test_the_guests_system_is_not_hidden(target: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(f"v:{target}")
    assert str(caught.value).startswith("The volume v cannot be mounted on ")
    assert str(caught.value).endswith("which the guest's system needs; choose another path, such as /data.")


@pytest.mark.parametrize(
    ("volumes", "mounts", "sentence"),
    [
        (
            ["a:/x", "a:/y:rw"],
            [],
            "The volume a is to be attached twice to one kernel; choose one path for it.",
        ),
        (["a:/x", "b:/x/"], [], "Two volumes are to be mounted on /x; give each a path of its own."),
        (
            ["a:/x/y"],
            ["/h:/x"],
            "The volume a is to be mounted on /x/y, over which /h is mounted on /x; choose another path for "
            "one of them.",
        ),
        (
            ["a:/x"],
            ["/h:/x"],
            "The volume a is to be mounted on /x, over which /h is mounted on /x; choose another path for "
            "one of them.",
        ),
    ],
)
def test_what_would_hide_a_volume_is_refused(volumes: list[str], mounts: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check([parse(text) for text in volumes], [mount.parse(text) for text in mounts])
    assert str(caught.value) == sentence
    with pytest.raises(ConfigurationError, match="volume"):
        placed(VMSpec(volumes=tuple(volumes), mounts=tuple(mounts)), {}, None)


def test_a_mount_may_lie_in_a_volume_and_a_volume_in_another_one() -> None:
    check([parse("a:/x"), parse("b:/x/y:rw")], [mount.parse("/h:/x/z")])


def test_there_are_as_many_as_the_guest_takes() -> None:
    assert MOST == MAX_VOLUMES
    many = [f"v{number}:/v{number}" for number in range(MOST + 1)]
    assert len(resolve([("kernel.json", {"volumes": many[:-1]})]).volumes) == MOST
    with pytest.raises(ConfigurationError, match="sets volumes to "):
        resolve([("kernel.json", {"volumes": many})])


def test_a_vm_is_not_begun_for_its_volumes() -> None:
    assert VMSpec(volumes=("a:/x",)).shape == VMSpec().shape
