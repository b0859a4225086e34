"""What the agent's answers mean, and nothing that they cannot mean. Pure.

The guest that wrote them may be hostile. Each function here takes the object of an answer, checks type and
range of every field it uses, and makes a frozen result, or raises a `GuestProtocolError`. Texts are put on
one line, stripped of what is not printable (control characters, bidirectional overrides) and cut.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sandbox_kernel.agent.tree import MAX_PROBLEMS, Tally
from sandbox_kernel.errors import (
    GuestError,
    GuestProtocolError,
    KernelStartError,
    MountError,
    VolumeError,
)

_TEXT = 2000
_NAME = 80
_LARGEST = 2**53
"""More than any count or size of a guest."""
_MAX_PID = 1 << 22
_MAX_PHASES = 16
_LONGEST_LINE = 300
_MOST_LINES = 400
_TO_END = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that somebody sends to end a process; any other one is the sign of a crash."""


@dataclass(frozen=True)
class Hello:
    """Who answers.

    Attributes:
        kernel: release of the guest's Linux.
        python: version of its Python.
        uptime: seconds since its boot.
        boot: phases of the boot, and the uptime in seconds when each was reached.
    """

    kernel: str
    python: str
    uptime: float
    boot: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """A started kernel.

    Attributes:
        pid: its process id in the guest.
        adopted: whether the template's kernel became it, so that connections to its channels are valid.
        clock: the guest's wall clock, nanoseconds since the epoch.
    """

    pid: int
    adopted: bool
    clock: int


@dataclass(frozen=True)
class Status:
    """How the kernel fares.

    Attributes:
        alive: whether its process runs.
        memory_current: bytes of memory in its cgroup, files in memory included.
        memory_peak: the most there have been.
        pids_current: its processes and threads.
        oom_kills: processes of it that were killed for want of memory.
        load: the guest's load average of one minute.
        memory_max: bytes of memory that it may have.
        uptime: seconds since the guest's boot.
        cpu: seconds of CPU that its cgroup has had.
        disk_used: bytes that are taken where its home is.
        disk_size: bytes that there are.
    """

    alive: bool
    memory_current: int
    memory_peak: int
    pids_current: int
    oom_kills: int
    load: float
    memory_max: int = 0
    uptime: float = 0.0
    cpu: float = 0.0
    disk_used: int = 0
    disk_size: int = 0

    def to_dict(self) -> dict[str, Any]:
        """This status as JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class KernelExit:
    """How the kernel's process ended.

    Attributes:
        code: exit status; None when it was killed by a signal.
        signal: that signal; None otherwise.
        out_of_memory: whether the guest's kernel killed it for want of memory.
        tail: the last text on its standard output and error.
        memory_peak: bytes; the most memory that its cgroup had.
    """

    code: int | None
    signal: int | None
    out_of_memory: bool
    tail: str
    memory_peak: int = 0

    @property
    def status(self) -> int:
        """The exit status as a shell would show it."""
        return self.code if self.code is not None else 128 + (self.signal or 0)

    @property
    def deliberate(self) -> bool:
        """Whether somebody wanted it to end, in the guest: neither a crash nor a limit."""
        return self.code is not None or (self.signal in _TO_END and not self.out_of_memory)

    def how(self) -> str:
        """How it ended, as the second half of a sentence."""
        if self.code is not None:
            return f"ended with status {self.code}"
        try:
            return f"was killed by {signal.Signals(self.signal or 0).name}"
        except ValueError:  # a real-time signal
            return f"was killed by signal {self.signal}"


@dataclass(frozen=True)
class ExecResult:
    """A program's exit code (negative: signal), its output, and whether output or time ran out."""

    code: int
    output: bytes
    truncated: bool
    timed_out: bool


def accepted(answer: Mapping[str, object]) -> dict[str, object]:
    """The answer, if it is one that grants the request.

    Raises:
        GuestError: it refuses, with a sentence; KernelStartError when the kernel cannot be started,
            MountError when a directory cannot be mounted, VolumeError when a volume cannot.
        GuestProtocolError: it does neither.
    """
    ok = _flag(answer, "ok")
    if ok:
        return dict(answer)
    reason = plain(_text(answer, "message"))
    match answer.get("error"):
        case "mount":
            raise MountError(f"The guest could not mount {reason}.")
        case "volume":
            raise VolumeError(
                f"The guest could not mount the volume on {reason}; if it is damaged, take a copy "
                "or a new one."
            )
        case "unclean":
            raise VolumeError(
                f"The volume on {reason} was not closed when its last kernel ended, so its journal has to be "
                "replayed before it can be read; attach it read-write once, with `:rw`."
            )
        case "start":
            kind: type[GuestError] = KernelStartError
        case _:
            kind = GuestError
    raise kind(reason or "The VM's agent refused without saying why.")


def hello(answer: Mapping[str, object]) -> Hello:
    """The answer to `hello`."""
    boot = answer.get("boot", {})
    if not isinstance(boot, dict) or len(boot) > _MAX_PHASES:
        raise _unusable("boot")
    return Hello(
        plain(_text(answer, "kernel"), _NAME),
        plain(_text(answer, "python"), _NAME),
        _real(answer, "uptime"),
        tuple((plain(name, _NAME), _real(boot, name)) for name in boot),
    )


def clock(answer: Mapping[str, object]) -> int:
    """The guest's wall clock in nanoseconds since the epoch."""
    return _whole(answer, "clock", 0, 2**63 - 1)


def started(answer: Mapping[str, object]) -> Started:
    """The answer to `start`."""
    return Started(_whole(answer, "pid", 1, _MAX_PID), _flag(answer, "adopted"), clock(answer))


def kernel_exit(answer: Mapping[str, object]) -> KernelExit:
    """The answer to `wait`."""
    code = None if answer.get("code") is None else _whole(answer, "code", 0, 255)
    signal = None if answer.get("signal") is None else _whole(answer, "signal", 1, 64)
    if (code is None) == (signal is None):
        raise GuestProtocolError("The VM's agent reports an exit status that is none.")
    return KernelExit(
        code,
        signal,
        _flag(answer, "out_of_memory"),
        plain(_text(answer, "tail")),
        _whole(answer, "memory_peak"),
    )


def signalled(answer: Mapping[str, object]) -> bool:
    """The answer to `signal`: whether somebody got it."""
    return _flag(answer, "alive")


def status(answer: Mapping[str, object]) -> Status:
    """The answer to `status`."""
    return Status(
        _flag(answer, "alive"),
        _whole(answer, "memory_current"),
        _whole(answer, "memory_peak"),
        _whole(answer, "pids_current"),
        _whole(answer, "oom_kills"),
        _real(answer, "load"),
        _whole(answer, "memory_max"),
        _real(answer, "uptime"),
        _real(answer, "cpu"),
        _whole(answer, "disk_used"),
        _whole(answer, "disk_size"),
    )


def exec_result(answer: Mapping[str, object], output: bytes) -> ExecResult:
    """The answer to `exec`."""
    return ExecResult(
        _whole(answer, "code", -64, 255), output, _flag(answer, "truncated"), _flag(answer, "timed_out")
    )


def stacks(output: bytes) -> str:
    """The payload of the answer to `stacks`: lines of printable text, one below the other."""
    lines = output.decode("utf-8", "replace").splitlines()
    return "\n".join(_printable(line[:_LONGEST_LINE]) for line in lines[:_MOST_LINES])


def written(answer: Mapping[str, object]) -> int:
    """The answer to `write`: the file's size in bytes."""
    return _whole(answer, "size")


def copied(answer: Mapping[str, object]) -> Tally:
    """The answer at the end of a `push`."""
    tally = Tally()
    tally.files, tally.directories = _whole(answer, "files"), _whole(answer, "directories")
    tally.size, tally.unlisted = _whole(answer, "size"), _whole(answer, "unlisted")
    tally.failed = _whole(answer, "failed")
    problems = answer.get("problems")
    if not isinstance(problems, list) or len(problems) > MAX_PROBLEMS:
        raise _unusable("problems")
    for each in problems:
        if not isinstance(each, list) or len(each) != 2:
            raise _unusable("problems")
        place = {"place": each[0], "reason": each[1]}
        tally.problems.append((_text(place, "place"), _whole(place, "reason", 0, 0xFFFF)))
    return tally


def plain(text: str, limit: int = _TEXT) -> str:
    """The end of a guest's text, at most `limit` characters, printable, on one line."""
    return " ".join(_printable(text[-limit:]).split())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _unusable(name: str) -> GuestProtocolError:
    return GuestProtocolError(f"The VM's agent sent no usable {plain(name, _NAME)!r}.")


def _flag(answer: Mapping[str, object], name: str) -> bool:
    value = answer.get(name)
    if not isinstance(value, bool):
        raise _unusable(name)
    return value


def _whole(answer: Mapping[str, object], name: str, low: int = 0, high: int = _LARGEST) -> int:
    value = answer.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _unusable(name)
    return value


def _real(answer: Mapping[str, object], name: str) -> float:
    value = answer.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _unusable(name)
    return float(value)


def _text(answer: Mapping[str, object], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise _unusable(name)
    return value
