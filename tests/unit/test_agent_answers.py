"""What the host makes of a hostile agent's answers."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox_kernel.agent import answers
from sandbox_kernel.errors import GuestError, GuestProtocolError, KernelStartError, VolumeError

HELLO = {"kernel": "6.12", "python": "3.13.5", "uptime": 4, "boot": {"agent": 3.5}}
EXIT = {"code": 0, "signal": None, "out_of_memory": False, "memory_peak": 0, "tail": ""}
STARTED = {"pid": 151, "adopted": True, "clock": 7}
STATUS = {
    "alive": True,
    "memory_current": 1,
    "memory_peak": 2,
    "memory_max": 3,
    "pids_current": 4,
    "oom_kills": 0,
    "load": 0.5,
    "uptime": 9.0,
    "cpu": 1.5,
    "disk_used": 10,
    "disk_size": 20,
}


def test_answers_of_an_honest_agent_are_taken_as_they_are() -> None:
    assert answers.hello(HELLO) == answers.Hello("6.12", "3.13.5", 4.0, (("agent", 3.5),))
    assert answers.kernel_exit(EXIT | {"tail": "bye\n"}) == answers.KernelExit(0, None, False, "bye")
    assert answers.status(STATUS) == answers.Status(True, 1, 2, 4, 0, 0.5, 3, 9.0, 1.5, 10, 20)
    assert answers.exec_result({"code": -9, "truncated": False, "timed_out": True}, b"x") == (
        answers.ExecResult(-9, b"x", False, True)
    )
    assert answers.started(STARTED) == answers.Started(151, True, 7)
    assert answers.written({"size": 0}) == 0


@pytest.mark.parametrize("value", [None, "1", True, -1, 2**53 + 1, 10**400, float("nan"), float("inf"), [1]])
@pytest.mark.parametrize("name", [name for name in STATUS if name != "alive"])
def test_a_number_that_is_none_or_cannot_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(GuestProtocolError, match=name):
        answers.status(STATUS | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"code": None},
        {"code": 1, "signal": 9},
        {"code": 256},
        {"code": -1},
        {"code": None, "signal": 65},
        {"code": None, "signal": 0},
        {"code": False},
        {"out_of_memory": 1},
        {"tail": None},
    ],
)
def test_an_exit_that_no_process_can_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GuestProtocolError):
        answers.kernel_exit(EXIT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0},
        {"pid": 2**22 + 1},
        {"pid": "1"},
        {"adopted": 1},
        {"adopted": None},
        {"clock": -1},
        {"clock": 2**63},
        {"clock": 1.5},
    ],
)
def test_a_start_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GuestProtocolError, match=next(iter(change))):
        answers.started(STARTED | change)
    with pytest.raises(GuestProtocolError):
        answers.started({name: value for name, value in STARTED.items() if name not in change})


@pytest.mark.parametrize("boot", [None, [1], {"x": "y"}, {str(n): 1.0 for n in range(17)}])
def test_phases_of_a_boot_are_few_and_have_times(boot: object) -> None:
    with pytest.raises(GuestProtocolError):
        answers.hello(HELLO | {"boot": boot})


def test_a_text_is_one_printable_line_of_bounded_length() -> None:
    assert answers.plain("a\x1b]0;title\x07\nb\u202ec\r\n\t d") == "a ]0;title b c d"
    assert len(answers.plain("x" * 100_000)) == 2000
    assert answers.plain("x" * 1_000 + "the end", 7) == "the end"
    assert len(answers.hello(HELLO | {"kernel": "k" * 5000}).kernel) == 80


def test_a_refusal_becomes_an_error_with_the_agents_sentence() -> None:
    refusal = {"ok": False, "error": "failed", "message": "read: Permission denied\x07: /x"}
    with pytest.raises(GuestError, match=r"^read: Permission denied : /x$"):
        answers.accepted(refusal)
    with pytest.raises(KernelStartError):
        answers.accepted(refusal | {"error": "start"})
    with pytest.raises(GuestError, match="without saying why"):
        answers.accepted(refusal | {"message": "\x00"})
    with pytest.raises(GuestProtocolError):
        answers.accepted({"ok": 1})


def test_an_exit_is_put_into_words() -> None:
    killed = answers.kernel_exit(EXIT | {"code": None, "signal": 9})
    assert (killed.status, killed.how()) == (137, "was killed by SIGKILL")
    ended = answers.kernel_exit(EXIT | {"code": 3})
    assert (ended.status, ended.how()) == (3, "ended with status 3")
    assert answers.kernel_exit(EXIT | {"code": None, "signal": 40}).how() == "was killed by signal 40"


@pytest.mark.parametrize(
    ("end", "deliberate"),
    [
        ({"code": 0}, True),
        ({"code": None, "signal": 15}, True),
        ({"code": None, "signal": 9}, True),
        ({"code": None, "signal": 9, "out_of_memory": True}, False),
        ({"code": None, "signal": 11}, False),
        ({"code": None, "signal": 6}, False),
    ],
)
def test_a_crash_and_a_limit_are_told_from_a_wish(end: dict[str, object], deliberate: bool) -> None:
    assert answers.kernel_exit(EXIT | end).deliberate is deliberate


def test_stacks_are_lines_of_printable_text_and_not_too_many_of_them() -> None:
    assert answers.stacks(b"Thread 1\n  File \x1b[31m\xe2\x80\xae\xff") == "Thread 1\n  File  [31m �"
    many = answers.stacks(b"x" * 10_000 + b"\n" + b"y\n" * 10_000)
    assert len(many.splitlines()) == 400
    assert len(many.splitlines()[0]) == 300


def test_a_volume_that_cannot_be_mounted_is_told_with_its_place() -> None:
    with pytest.raises(VolumeError) as caught:
        answers.accepted({"ok": False, "error": "volume", "message": "/data: Structure needs cleaning"})
    assert str(caught.value) == (
        "The guest could not mount the volume on /data: Structure needs cleaning; if it is damaged, take a "
        "copy or a new one."
    )
    with pytest.raises(VolumeError) as caught:
        answers.accepted({"ok": False, "error": "unclean", "message": "/data"})
    assert str(caught.value) == (
        "The volume on /data was not closed when its last kernel ended, so its journal has to be replayed "
        "before it can be read; attach it read-write once, with `:rw`."
    )
