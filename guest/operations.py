"""What the agent does on request: one method an operation, each as `agent_protocol` describes it.

Requests come from the host, which is trusted; but what they touch (files, processes) belongs to user code,
which is not. So files are opened as the kernel's user, never through a link at the end, never blocking, and
only when they are regular; programs run as that user unless the host asks for root.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
import threading
import time

import system
from agent_protocol import MAX_PAYLOAD, OPERATIONS, PROTOCOL_VERSION
from children import Children, Plan
from kernel_process import CGROUP, ENVIRONMENT, GID, HOME, UID, KernelProcess, read_counters

_MAX_EXEC = 300.0


class Refused(Exception):
    """The request cannot be fulfilled; the text is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Operations:
    """The agent's operations on this guest."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._kernel: KernelProcess | None = None
        self._starting = threading.Lock()

    def perform(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        """Answers one request.

        Raises:
            Refused: with a code and a sentence.
        """
        method = getattr(self, f"_do_{request.get('op')}", None) if request.get("op") in OPERATIONS else None
        if method is None:
            raise Refused("unknown", f"The agent has no operation {str(request.get('op'))[:40]!r}.")
        try:
            result: tuple[dict[str, object], bytes] = method(request, payload)
        except OSError as error:
            raise Refused(
                "failed", f"{request['op']}: {error.strerror}: {error.filename or ''}".rstrip(": ")
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise Refused("malformed", f"{request['op']}: {error}") from error
        return result

    def _do_hello(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        with open("/proc/uptime") as uptime:
            up = float(uptime.read().split()[0])
        return {
            "version": PROTOCOL_VERSION,
            "kernel": os.uname().release,
            "python": ".".join(map(str, sys.version_info[:3])),
            "uptime": up,
        }, b""

    def _do_configure(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        if "clock" in request:
            time.clock_settime_ns(time.CLOCK_REALTIME, int(request["clock"]))  # type: ignore[call-overload]
        if "hostname" in request:
            socket.sethostname(str(request["hostname"]))
        if payload:
            system.add_entropy(payload)
        if "pids" in request:
            with open(f"{CGROUP}/pids.max", "w") as file:
                file.write(str(int(request["pids"])))  # type: ignore[call-overload]
        return {}, b""

    def _do_start(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        with self._starting:
            if self._kernel is not None:
                raise Refused("started", "The kernel of this VM has been started already.")
            try:
                self._kernel = KernelProcess(self._children, "/run/sandbox-kernel", request)
            except OSError as error:
                raise Refused(
                    "start", f"The kernel's command cannot be executed: {error.filename}: {error.strerror}."
                ) from error
        return {"pid": self._kernel.pid}, b""

    def _do_wait(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        return self._started().wait(), b""

    def _do_signal(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        number = request["number"]
        if not isinstance(number, int) or not 0 <= number <= 64:
            raise ValueError("a signal's number is from 0 to 64")
        return {"alive": self._started().signal(number)}, b""

    def _do_status(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        kernel = self._kernel
        values = {}
        for name in ("memory.current", "memory.peak", "pids.current"):
            with open(f"{CGROUP}/{name}") as file:
                values[name.replace(".", "_")] = int(file.read())
        return {
            "alive": kernel is not None and kernel.alive,
            **values,
            "oom_kills": read_counters("memory.events").get("oom_kill", 0),
            "load": os.getloadavg()[0],
        }, b""

    def _do_exec(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        argv, env = request["argv"], request.get("env", {})
        timeout = request.get("seconds", 30)
        if not isinstance(argv, list) or not isinstance(env, dict) or not isinstance(timeout, int | float):
            raise ValueError("argv is a list, env an object, seconds a number")
        root = request.get("root") is True
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            plan = Plan(
                [str(word) for word in argv],
                {**ENVIRONMENT, **{str(k): str(v) for k, v in env.items()}},
                "/" if root else HOME,
                0 if root else UID,
                0 if root else GID,
                None if root else CGROUP,
                null,
                writer,
                writer,
            )
            pid = self._children.start(plan)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(null)
            os.close(writer)
        return self._collect(pid, reader, min(float(timeout), _MAX_EXEC))

    def _collect(self, pid: int, reader: int, timeout: float) -> tuple[dict[str, object], bytes]:
        """Output and status of a program; its process group is killed when the time is up."""
        deadline = time.monotonic() + timeout
        output = b""
        truncated = timed_out = False
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                timed_out = True
                break
            data = os.read(reader, 65536)
            if not data:
                break
            truncated = truncated or len(output) + len(data) > MAX_PAYLOAD
            output += data[: MAX_PAYLOAD - len(output)]
        os.close(reader)
        status = None if timed_out else self._children.wait(pid, max(0.0, deadline - time.monotonic()))
        if status is None:
            timed_out = True
            os.killpg(pid, 9)
            status = self._children.wait(pid, None)
        assert status is not None
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "truncated": truncated, "timed_out": timed_out}, output

    def _do_read(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        length = int(request.get("length", MAX_PAYLOAD))  # type: ignore[call-overload]
        if not 0 <= length <= MAX_PAYLOAD:
            raise ValueError(f"a length is from 0 to {MAX_PAYLOAD}")
        fd = _open(str(request["path"]), os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            return {"size": size}, os.pread(fd, length, int(request.get("offset", 0)))  # type: ignore[call-overload]
        finally:
            os.close(fd)

    def _do_write(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        offset = int(request.get("offset", 0))  # type: ignore[call-overload]
        mode = int(request.get("mode", 0o644))  # type: ignore[call-overload]
        fd = _open(str(request["path"]), os.O_WRONLY | os.O_CREAT, mode & 0o777)
        try:
            if offset == 0:
                os.ftruncate(fd, 0)
            written = 0
            while written < len(payload):
                written += os.pwrite(fd, payload[written:], offset + written)
            return {"size": os.fstat(fd).st_size}, b""
        finally:
            os.close(fd)

    def _do_shutdown(self, request: dict[str, object], payload: bytes) -> tuple[dict[str, object], bytes]:
        threading.Timer(0.05, system.reboot).start()
        return {}, b""

    def _started(self) -> KernelProcess:
        if self._kernel is None:
            raise Refused("not started", "The kernel of this VM has not been started.")
        return self._kernel


def _open(path: str, flags: int, mode: int = 0) -> int:
    """Opens a regular file as the kernel's user, without following a link at its end, without blocking."""
    if not path.startswith("/"):
        path = f"{HOME}/{path}"
    if os.getuid() == 0:
        system.act_as(UID, GID)
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    finally:
        if os.getuid() == 0:
            system.act_as(0, 0)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path} is not a regular file")
    return fd
