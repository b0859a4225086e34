"""A clone's start over QMP, against a QEMU that is a socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from sandbox_kernel.qemu.script import Script, script


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def commands(text: bytes) -> list[str]:
    return [json.loads(line)["execute"] for line in text.splitlines()]


def test_what_lies_there_before_qemu_starts_loads_the_devices() -> None:
    text = script(7)
    assert commands(text) == ["qmp_capabilities", *["migrate-set-capabilities"] * 2, "migrate-incoming"]
    assert json.loads(text.splitlines()[-1])["arguments"] == {"uri": "fd:7"}


def test_the_guest_runs_when_the_last_command_is_answered(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    followed = Script(ours)
    followed.look()
    assert not followed.loaded
    theirs.send(b'{"QMP": {}}\n{"return": {}, "id": "start"}\n{"event": "MIGRATION", "data": {"status": "act')
    followed.look()
    assert (followed.loaded, followed.error) == (False, "")
    theirs.send(b'ive"}}\n{"event": "MIGRATION", "data": {"status": "completed"}}\n')
    followed.look()
    assert (followed.loaded, followed.running) == (True, False)
    followed.plug_in({"driver": "x"})
    assert commands(theirs.recv(4096)) == ["device_add"]
    theirs.send(b'{"return": {}, "id": "start"}\n')
    followed.look()
    assert not followed.running
    followed.go_on()
    assert commands(theirs.recv(4096)) == ["cont"]
    theirs.send(b'{"return": {}, "id": "last"}\n')
    followed.look()
    assert (followed.running, followed.error) == (True, "")


@pytest.mark.parametrize(
    "said",
    [
        b'{"error": {"class": "GenericError", "desc": "no such fd"}}\n',
        b"[1]\n",
        b"\xff\n",
        b'{"event": "MIGRATION"}\n',
        b'{"event": "MIGRATION", "data": 3}\n',
        b"x" * 70000,
    ],
)
def test_what_goes_wrong_is_told(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    ours, theirs = ends
    followed = Script(ours)
    theirs.sendall(said)
    followed.look()
    assert followed.error
    assert len(followed.error) < 400
    assert not followed.running


def test_a_qemu_that_is_gone_says_nothing_more(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.close()
    followed = Script(ours)
    followed.look()
    assert not followed.error
