"""Volumes in the guest: how a request names them, and how a disk is found that has just been plugged in."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import volumes
from agent_protocol import MAX_VOLUMES


def test_a_request_names_volumes_or_none() -> None:
    assert volumes.parse({}) == []
    [one, two] = volumes.parse(
        {
            "volumes": [
                {"serial": "volume-0", "target": "/a", "read_only": True},
                {"serial": "v", "target": "/b"},
            ]
        }
    )
    assert (one.serial, one.target, one.read_only) == ("volume-0", "/a", True)
    assert two.read_only is False


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        ["volume-0"],
        [{"serial": "", "target": "/a"}],
        [{"serial": "x" * 21, "target": "/a"}],
        [{"serial": "x"}],
        [{"serial": "x", "target": "/a\0"}],
        [{"serial": "x", "target": "/a"}] * (MAX_VOLUMES + 1),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError):
        volumes.parse({"volumes": wrong})


def disk(blocks: Path, name: str, serial: str | None) -> None:
    (blocks / name).mkdir()
    if serial is not None:
        (blocks / name / "serial").write_text(serial)


def test_a_disk_is_known_by_its_serial_number_alone(tmp_path: Path) -> None:
    # Names that are devices on this host, too.
    disk(tmp_path, "zero", "volume-10")
    disk(tmp_path, "null", "volume-1\n")
    disk(tmp_path, "full", None)
    assert volumes.await_device("volume-1", str(tmp_path), "/nothing") == "/dev/null"


def test_linux_is_made_to_look_for_a_disk_that_is_not_there_yet(tmp_path: Path) -> None:
    blocks, rescan = tmp_path / "block", tmp_path / "rescan"
    blocks.mkdir()
    rescan.touch()

    def plug_in() -> None:
        while not rescan.read_text():
            pass
        disk(blocks, "null", "volume-0")

    linux = threading.Thread(target=plug_in)
    linux.start()
    assert volumes.await_device("volume-0", str(blocks), str(rescan)) == "/dev/null"
    linux.join()


def test_a_disk_that_does_not_come_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "_SECONDS", 0.05)
    (tmp_path / "rescan").touch()
    with pytest.raises(OSError, match="No such device"):
        volumes.await_device("volume-0", str(tmp_path), str(tmp_path / "rescan"))


def test_a_guest_without_volumes_has_nothing_to_freeze() -> None:
    volumes.Volumes().freeze()
