"""A clone's start over QMP, against a QEMU that is a socket."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.qemu.command import nic_backend, nic_device
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


def test_a_clone_with_a_network_loads_its_devices_when_its_own_is_there(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    assert commands(script(7, complete=False)) == [
        *("qmp_capabilities", "migrate-set-capabilities", "migrate-set-capabilities"),
        "migrate-set-parameters",
    ]
    ours, theirs = ends
    Script(ours).load(7)
    assert json.loads(theirs.recv(4096))["arguments"] == {"uri": "fd:7"}


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


REFUSED = b'{"error": {"class": "GenericError", "desc": "no tap"}, "id": "nic"}\n'


def test_a_network_device_is_given_by_its_descriptor(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with Path("/dev/null").open() as file:
        Script(ours).connect("nic", file.fileno(), nic_backend(), dict(nic_device("02:00:00:00:00:01")))
        text, fds, _, _ = socket.recv_fds(theirs, 4096, 4)
        [fd] = fds
        with os.fdopen(fd) as got:
            assert os.path.samestat(os.fstat(got.fileno()), os.fstat(file.fileno()))
    while text.count(b"\n") < 3:
        text += theirs.recv(4096)
    device = dict(nic_device("02:00:00:00:00:01"))
    assert [json.loads(line) for line in text.splitlines()] == [
        {"execute": "getfd", "arguments": {"fdname": "nic"}, "id": "nic"},
        {"execute": "netdev_add", "arguments": {"type": "tap", "id": "nic", "fd": "nic"}, "id": "nic"},
        {"execute": "device_add", "arguments": device, "id": "nic"},
    ]


def test_a_network_device_that_is_refused_is_no_failed_restore(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    followed = Script(ours)
    theirs.sendall(REFUSED + REFUSED.replace(b"no tap", b"what follows from it"))
    followed.look()
    assert "no tap" in followed.refused
    assert "what follows" not in followed.refused
    assert followed.error == ""
    theirs.sendall(b'{"return": {}, "id": "last"}\n')
    followed.look()
    assert followed.running


def test_a_failed_restore_is_no_refused_network_device(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    followed = Script(ours)
    theirs.sendall(b'{"error": {"class": "GenericError", "desc": "no such fd"}, "id": "start"}\n')
    followed.look()
    assert "no such fd" in followed.error
    assert followed.refused == ""


def test_what_a_refusal_says_is_cut(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    followed = Script(ours)
    theirs.sendall(REFUSED.replace(b"no tap", b"x" * 3000))
    followed.look()
    assert len(followed.refused) == 300
