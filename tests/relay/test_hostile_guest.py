"""Whatever a guest sends, the relay lives, its memory is bounded, and `failed` says what was wrong."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from sandbox_kernel.death import Death
from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.relay import zmtp
from sandbox_kernel.relay.limits import RelayLimits
from tests.relay import hostile
from tests.relay.conftest import MakeRig
from tests.relay.conversation import run
from tests.relay.hostile import Script, jupyter
from tests.relay.rig import Rig

MEBIBYTE = 1 << 20


def failure(rig: Rig) -> str:
    rig.wait_until(rig.relay.failed.done)
    return str(rig.relay.failed.result())


def attach(rig: Rig) -> None:
    """Attaches; a guest may fail so early that attaching fails, too."""
    with contextlib.suppress(GuestProtocolError):
        rig.attach()


@pytest.mark.parametrize("channel", ["shell", "control", "stdin", "iopub"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"x" * 100, "does not speak ZMTP", id="http"),
        pytest.param(bytes(1000), "does not speak ZMTP", id="zeros"),
        pytest.param(zmtp.greeting().replace(b"NULL", b"EVIL"), "mechanism is not NULL", id="mechanism"),
        pytest.param(zmtp.greeting() + zmtp.ready("PULL", b""), "its socket is 'PULL'", id="socket type"),
        pytest.param(zmtp.greeting() + b"\x04\x06\x05HELLO", "not READY", id="no READY"),
        pytest.param(zmtp.greeting() + b"\x04\x0a\x05READY\x04abc", "cut off", id="cut off"),
        pytest.param(
            zmtp.greeting() + b"\x04\x0f\x05READY\x01a\xff\xff\xff\xffabc", "cut off", id="long value"
        ),
        pytest.param(zmtp.greeting() + b"\x00\x01x", "before the handshake", id="early message"),
        pytest.param(zmtp.greeting() + b"\xff" + bytes(9), "flags 0xff", id="flags"),
    ],
)
def test_a_guest_that_does_not_shake_hands_fails(
    make_rig: MakeRig, channel: str, data: bytes, says: str
) -> None:
    rig = make_rig()
    with hostile.guest(rig, channel, hostile.say(data), greet=False):
        with pytest.raises(GuestProtocolError, match=f"channel {channel}"):
            rig.attach()
        assert says in failure(rig)


LIMITS = RelayLimits(
    message_bytes=dict.fromkeys(("shell", "control", "stdin", "iopub"), MEBIBYTE), message_frames=100
)


@pytest.mark.parametrize("channel", ["shell", "control", "stdin", "iopub"])
@pytest.mark.parametrize(
    ("script", "says"),
    [
        pytest.param(hostile.say(b"\x02" + b"\xff" * 8), "more than 16777216 bytes", id="2^64 bytes"),
        pytest.param(
            hostile.speak([b"x", bytes(MEBIBYTE)]),
            "a message of 1048577 bytes is none of Jupyter's",
            id="1 MiB + 1",
        ),
        pytest.param(hostile.for_ever(b"\x01\x00" * 1000), "more than 100 frames", id="endless empty frames"),
        pytest.param(
            hostile.for_ever(b"\x03" + (50_000).to_bytes(8, "big") + bytes(50_000)),
            "more than 100 frames",
            id="endless large frames",
        ),
        pytest.param(hostile.speak([b"x"] * 101), "more than 100 frames", id="101 frames"),
        pytest.param(
            hostile.say(b"\x06" + (2000).to_bytes(8, "big")), "a command has 2000 bytes", id="command"
        ),
        pytest.param(hostile.say(b"\x01\x01a\x04\x01b"), "command stands inside a message", id="split"),
    ],
)
def test_a_guest_that_breaks_a_bound_fails(
    make_rig: MakeRig, channel: str, script: Script, says: str
) -> None:
    rig = make_rig(limits=LIMITS)
    with hostile.guest(rig, channel, script):
        attach(rig)
        assert says in failure(rig)


@pytest.mark.parametrize("channel", ["shell", "control", "stdin", "iopub"])
@pytest.mark.parametrize(
    "message",
    [
        pytest.param([b"x"], id="one frame"),
        pytest.param([b"x"] * 50, id="no delimiter"),
        pytest.param([b""] * 20, id="empty frames"),
        pytest.param([b"i", b"<IDS|MSG>", b"sig"], id="cut off"),
        pytest.param(jupyter(*[b"i"] * 9), id="too many identities"),
    ],
)
def test_what_is_no_message_of_jupyter_fails(make_rig: MakeRig, channel: str, message: list[bytes]) -> None:
    rig = make_rig()
    with hostile.guest(rig, channel, hostile.speak(message)):
        attach(rig)
        assert "a message is none of Jupyter's" in failure(rig)


@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
def test_a_reply_to_nobody_fails(make_rig: MakeRig, channel: str) -> None:
    rig = make_rig()
    with hostile.guest(rig, channel, hostile.speak(jupyter())):
        attach(rig)
        assert "has no identity" in failure(rig)


def test_messages_that_only_look_right_do_no_harm(make_rig: MakeRig) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    nested = b"[" * 30_000
    noise = [
        jupyter(b"nobody", kind="execute_reply", parent="unknown"),
        jupyter(b"", kind="execute_reply"),
        jupyter(b"x" * 255, kind="execute_reply"),
        jupyter(b"x" * 30_000, kind="execute_reply"),
        jupyter(*[b"i"] * 8),
        jupyter(b"\x00\x01\x02\x03\x04", kind="kernel_info_reply"),
        [b"nobody", b"<IDS|MSG>", b"", nested, nested, nested, nested],
        [b"nobody", b"<IDS|MSG>", b"", b"\xff\xfe", b"\xff\xfe", b"1", b"null"],
        [b"nobody", b"<IDS|MSG>", b"", b"[]", b"[]", b'{"msg_id": 1}', b'"iopub_welcome"'],
        [client.session.bsession, b"<IDS|MSG>", b"bad", b"{}", b"{}", b"{}", b"{}"],
        [b"nobody", b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", bytes(500_000)],
    ]
    welcome = jupyter(kind="iopub_welcome")
    count = jupyter(b"t", kind="execute_input")
    count[-1] = b'{"execution_count": "many"}'
    with hostile.guest(rig, "shell", hostile.speak(*noise)):
        rig.attach()
    other = make_rig()
    with hostile.guest(other, "iopub", hostile.speak(welcome, count, *noise, welcome)):
        other.attach()
    for each in (rig, other):
        each.thread.run(each.relay.drain(1))
        assert not each.relay.failed.done()


def test_a_guest_that_hangs_up_after_the_handshake_ends_the_wait_for_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    with hostile.guest(rig, "shell", lambda connection: connection.shutdown(socket.SHUT_RDWR)):
        rig.attach()
    rig.thread.run(rig.relay.drain(30))
    assert not rig.relay.failed.done()


def test_a_guest_that_does_not_read_makes_its_clients_wait_and_nobody_else(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.start()
    client = rig.client()
    assert rig.kernel is not None
    run(client, "import os, signal")
    big = "'" + "x" * MEBIBYTE + "'"
    rig.kernel.send_signal(19)  # SIGSTOP: nothing is read any more
    requests = [client.execute(big, silent=True) for _ in range(16)]
    # The relay still serves its clients: a new subscriber is welcomed while shell waits.
    watcher = rig.client(ready=False)
    assert watcher.get_iopub_msg(timeout=30)["msg_type"] == "iopub_welcome"
    rig.kernel.send_signal(18)
    for request in requests:
        while client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] != request:
            pass


def test_the_failure_is_one_logged_line(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig()
    with hostile.guest(rig, "iopub", hostile.speak(*[[b"x"]] * 1000)):
        attach(rig)
        failure(rig)
    rig.thread.run(rig.relay.aclose())
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [failure(rig)]
    assert "\n" not in failure(rig)


def test_after_a_failure_the_clients_still_get_the_report(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    request = client.execute("1")
    with hostile.guest(rig, "stdin", hostile.speak([b"x"] * 20)):
        attach(rig)
        reason = failure(rig)
    rig.thread.run(rig.relay.report_death(Death("GuestProtocolError", reason)))
    while not client.shell_channel.msg_ready():
        rig.thread.run(rig.relay.report_death(Death("GuestProtocolError", reason)))
    reply = client.get_shell_msg(timeout=30)
    assert reply["parent_header"]["msg_id"] == request
    assert reply["content"]["evalue"] == reason
