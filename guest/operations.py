"""What the agent does on request: one method an operation, each as `agent_protocol` describes it.

Requests come from the host, which is trusted; but what they touch (files, processes) belongs to user code,
which is not: files.py and program.py keep it at a distance.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import cgroup
import fields
import files
import program
import system
import volumes
from agent_protocol import MAX_EXEC_SECONDS, MAX_PAYLOAD, OPERATIONS, PROTOCOL_VERSION
from answer import Answer, Refused
from children import Children, Plan
from configuration import Configuration
from copies import Copies
from fields import Request
from kernel_process import KernelProcess, Order
from mounts import Mounts
from ports import Ports
from settings import Settings
from template import Standby

_LONGEST_PATH = 4096
_LONGEST_NAME = 255
_LARGEST = 2**63 - 1
_EXEC_SECONDS = 30.0


class Operations:
    """The agent's operations on this guest."""

    def __init__(
        self,
        children: Children,
        settings: Settings,
        boot: dict[str, float] | None = None,
        end_machine: Callable[[], None] = system.reboot,
    ) -> None:
        """`boot` is the uptime in seconds when each phase of the boot was reached."""
        self._children = children
        self._settings = settings
        self._boot = boot or {}
        self._end_machine = end_machine
        self._kernel: KernelProcess | None = None
        self._mounts = Mounts(settings)
        self._volumes = volumes.Volumes()
        self._ports = Ports()
        self._copies = Copies(settings)
        self.standby: Standby | None = None
        """The kernel of a template, until the first `start`."""
        self._starting = threading.Lock()
        """Held by whoever makes a kernel of something, or tries it out."""

    def perform(self, request: Request, payload: bytes, peer: int) -> Answer | None:
        """Answers one request that came over the connection with the descriptor `peer`.

        Returns:
            The answer; None where the connection has become something else's.

        Raises:
            Refused: with a code and a sentence.
        """
        op = request.get("op")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise Refused("unknown", f"The agent has no operation {str(op)[:40]!r}.")
        try:
            if op == "wait":
                return self._wait(peer)
            if op == "mount":
                self._mount(request, peer)
                return None
            if op == "connect":
                self._ports.connect(fields.integer(request, "port", 1, 65535), peer)
                return None
            method: Callable[[Request, bytes], Answer] = getattr(self, f"_{op}")
            return method(request, payload)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise Refused("failed", f"{op}: {error.strerror or error}{where}") from error
        except (ValueError, OverflowError, RecursionError) as error:
            # A time that no clock has, nesting that can be read but not written to a file.
            raise Refused("malformed", f"{op}: {error}") from error
        except MemoryError as error:
            raise Refused("failed", f"{op}: the agent has no memory left") from error

    def _hello(self, request: Request, payload: bytes) -> Answer:
        return Answer(
            {
                "version": PROTOCOL_VERSION,
                "kernel": os.uname().release,
                "python": sys.version.split()[0],
                "uptime": system.uptime(),
                "boot": self._boot,
            }
        )

    def _configure(self, request: Request, payload: bytes) -> Answer:
        Configuration(request, payload).apply(self._settings, self.standby is not None)
        return Answer({"clock": time.time_ns()})

    def _start(self, request: Request, payload: bytes) -> Answer:
        configuration = Configuration(fields.mapping(request, "configuration", {}), payload)
        order = Order(
            fields.words(request, "argv"),
            fields.variables(request, "env"),
            fields.text(request, "cwd", _LONGEST_PATH, self._settings.home),
            fields.mapping(request, "connection"),
        )
        mounts = fields.texts(request, "mounts", _LONGEST_PATH)
        attached = volumes.parse(request)
        with self._starting:
            if self._kernel is not None:
                raise Refused("started", "The kernel of this VM has been started already.")
            configuration.apply(self._settings, self.standby is not None)
            if configuration.scratch and self.standby is not None:
                self.standby.leave_home()
            if attached:
                self._attach(attached)
            self._mounts.allow(mounts)
            # A kernel can begin while a mount is still being made, but not in a directory that comes with it.
            place = f"{os.path.normpath(order.cwd)}/"
            later = [target for target in mounts if not place.startswith(f"{target}/")]
            for target in mounts:
                if target not in later:
                    self._mounts.await_made(target)
            try:
                adopted = self._adopt(order)
                self._kernel = adopted or KernelProcess(self._children, self._settings, order)
            except OSError as error:
                raise Refused(
                    "start", f"The kernel's command cannot be executed: {error.filename}: {error.strerror}."
                ) from error
            for target in later:
                self._mounts.await_made(target)
            return Answer({"pid": self._kernel.pid, "adopted": adopted is not None, "clock": time.time_ns()})

    def _attach(self, attached: list[volumes.Volume]) -> None:
        self._volumes.attach(attached)
        home = f"{self._settings.home}/"
        if self.standby is not None and any(home.startswith(f"{each.target}/") for each in attached):
            self.standby.leave_home()

    def _adopt(self, order: Order) -> KernelProcess | None:
        if self.standby is None:
            return None
        adopted = self.standby.adopt(order)
        # Not before: what cannot even be written to it leaves the kernel as it was, and somebody's.
        self.standby = None
        return adopted

    def _rehearse(self, request: Request, payload: bytes) -> Answer:
        configuration = Configuration(fields.mapping(request, "configuration", {}), payload)
        with self._starting:
            if self.standby is None:
                raise Refused("no standby", "No kernel stands by in this VM.")
            configuration.apply(self._settings, True)
            if not self.standby.rehearse():
                self.standby = None
                raise Refused("failed", "rehearse: the kernel that stood by has ended")
            return Answer()

    def _wait(self, peer: int) -> Answer:
        status = self._started().wait(peer)
        if status is None:
            raise Refused("failed", "wait: nobody waits any more")
        return Answer(status)

    def _signal(self, request: Request, payload: bytes) -> Answer:
        number = fields.integer(request, "number", 0, 64)
        return Answer({"alive": self._started().signal(number)})

    def _stacks(self, request: Request, payload: bytes) -> Answer:
        return Answer(payload=self._started().stacks())

    def _status(self, request: Request, payload: bytes) -> Answer:
        kernel, settings = self._kernel, self._settings
        disk = os.statvfs(settings.home)
        return Answer(
            {
                "alive": kernel is not None and kernel.alive,
                "memory_current": cgroup.number(settings, "memory.current"),
                "memory_peak": cgroup.number(settings, "memory.peak"),
                "memory_max": cgroup.number(settings, "memory.max"),
                "pids_current": cgroup.number(settings, "pids.current"),
                "oom_kills": cgroup.out_of_memory_kills(settings),
                "load": os.getloadavg()[0],
                "cpu": cgroup.cpu_seconds(settings),
                "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
                "disk_size": disk.f_blocks * disk.f_frsize,
                "uptime": system.uptime(),
            }
        )

    def _exec(self, request: Request, payload: bytes) -> Answer:
        settings = self._settings
        argv, env = fields.words(request, "argv"), fields.variables(request, "env")
        seconds = fields.seconds(request, "seconds", MAX_EXEC_SECONDS, _EXEC_SECONDS)
        root = request.get("root") is True
        cwd = fields.text(request, "cwd", _LONGEST_PATH, "/" if root else settings.home)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            plan = Plan(
                argv,
                {**(_ROOT_ENVIRONMENT if root else settings.environment()), **env},
                cwd,
                0 if root else settings.uid,
                0 if root else settings.gid,
                settings.root_cgroup if root else settings.kernel_cgroup,
                null,
                writer,
            )
            outcome = program.run(self._children, plan, reader, seconds, MAX_PAYLOAD)
        finally:
            os.close(null)
        return Answer(
            {"code": outcome.code, "truncated": outcome.truncated, "timed_out": outcome.timed_out},
            outcome.output,
        )

    def _read(self, request: Request, payload: bytes) -> Answer:
        path = fields.text(request, "path", _LONGEST_PATH)
        offset = fields.integer(request, "offset", 0, _LARGEST, 0)
        length = fields.integer(request, "length", 0, MAX_PAYLOAD, MAX_PAYLOAD)
        content, size = files.read(self._settings, path, offset, length)
        return Answer({"size": size}, content)

    def _write(self, request: Request, payload: bytes) -> Answer:
        path = fields.text(request, "path", _LONGEST_PATH)
        offset = fields.integer(request, "offset", 0, _LARGEST, 0)
        mode = fields.integer(request, "mode", 0, 0o777, 0o644)
        return Answer({"size": files.write(self._settings, path, payload, offset, mode)})

    def _pull(self, request: Request, payload: bytes) -> Answer:
        return Answer(copy=self._copies.pull(fields.text(request, "path", _LONGEST_PATH)))

    def _push(self, request: Request, payload: bytes) -> Answer:
        path, name = fields.text(request, "path", _LONGEST_PATH), request.get("name")
        if name is not None:
            name = fields.text(request, "name", _LONGEST_NAME)
            if "/" in name or name in (".", ".."):
                raise ValueError("name is a name")
        return Answer(copy=self._copies.push(path, name or ""))

    def _mount(self, request: Request, peer: int) -> None:
        self._mounts.make(
            fields.text(request, "target", _LONGEST_PATH), request.get("read_only") is True, peer
        )

    def _mounted(self, request: Request, payload: bytes) -> Answer:
        self._mounts.await_made(fields.text(request, "target", _LONGEST_PATH))
        return Answer()

    def _unmount(self, request: Request, payload: bytes) -> Answer:
        self._mounts.remove(fields.text(request, "target", _LONGEST_PATH))
        return Answer()

    def _freeze(self, request: Request, payload: bytes) -> Answer:
        self._volumes.freeze()
        return Answer()

    def _shutdown(self, request: Request, payload: bytes) -> Answer:
        return Answer(afterwards=self._end_machine)

    def _started(self) -> KernelProcess:
        if self._kernel is None:
            raise Refused("not started", "The kernel of this VM has not been started.")
        return self._kernel


_ROOT_ENVIRONMENT = {
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
