"""The pool's service: keeps VMs waiting as policy.py says, and gives them to provisioners, each one once.

Ownership. The service holds the client's end of each waiting supervisor's control socket. That end goes with
the VM to whoever takes it, and the service's copy is closed; when the service dies, in whatever way, its ends
close and what still waits ends by itself, while VMs that were taken do not notice. The zygote ends the same
way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import HostError, SandboxKernelError
from sandbox_kernel.host.template import ensure_in_loop
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.machine import footprint
from sandbox_kernel.pool import memory
from sandbox_kernel.pool.config import PoolConfig
from sandbox_kernel.pool.policy import QUIET, Rules, Waiting, decide
from sandbox_kernel.pool.protocol import FOLDER, MAX_LINE, SOCKET, same_user
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor import folders
from sandbox_kernel.supervisor.control import PrepareRequest, from_line, to_line
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.lifeline import Ward
from sandbox_kernel.supervisor.surroundings import surroundings
from sandbox_kernel.supervisor.zygote import Zygote

log = logging.getLogger(__name__)

_LOOK = 5.0
"""Seconds between two looks at ages and memory."""
_REQUEST = 2.0
"""Seconds in which a provisioner must have said what it wants."""
_LONG_AGO = 1e9


@dataclass
class _VM:
    """One VM of the pool."""

    id: str
    kind: str
    spec: VMSpec
    ward: Ward
    control: socket.socket
    handle: SupervisorHandle
    born: float = field(default_factory=time.monotonic)
    ready: bool = False
    image: str = ""
    memory: float = 0.0

    def end(self) -> None:
        """Lets it end by itself."""
        self.control.close()
        self.ward.close()


class Service:
    """A pool that runs."""

    def __init__(self, config: PoolConfig, specs: Mapping[str, VMSpec]) -> None:
        """Nothing yet; see `run`.

        Args:
            config: how many of what.
            specs: the VM of each kernelspec in `config`.
        """
        self._rules = Rules(config.kernels, config.memory, config.max_age)
        self._specs = dict(specs)
        self._vms: dict[str, _VM] = {}
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken = self._failed = -_LONG_AGO
        self._failures = 0
        self._given = 0
        self._why_not = ""
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT.

        Raises:
            HostError: another pool of this user runs, or something is missing.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with self._stack:
            place = self._stack.enter_context(_alone()) / SOCKET
            self._surroundings = surroundings()
            self._zygote = Zygote()
            self._stack.callback(self._zygote.close)
            self._stack.push_async_callback(self._end_all)
            server = await asyncio.start_unix_server(self._serve, place, limit=MAX_LINE)
            self._stack.callback(server.close)
            log.info("the pool is at %s, as process %d", place, os.getpid())
            stopped = loop.create_task(self._stop.wait())
            while not self._stop.is_set():
                self._tend()
                self._wake.clear()
                woken = loop.create_task(self._wake.wait())
                await asyncio.wait((stopped, woken), timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()

    def status(self) -> dict[str, Any]:
        """What there is, for people."""
        return {
            "pid": os.getpid(),
            "zygote": self._zygote.pid,
            "given": self._given,
            "sizes": dict(self._rules.sizes),
            "why_not": self._why_not,
            "vms": [asdict(self._seen(vm)) | {"pid": vm.ward.pid} for vm in self._vms.values()],
        }

    def _tend(self) -> None:
        """Does what the policy says."""
        now = time.monotonic()
        for vm in self._vms.values():
            if vm.ready:
                vm.memory = footprint.of_tree(vm.ward.pid)
        pool = [self._seen(vm) for vm in self._vms.values()]
        decision = decide(
            self._rules, pool, memory.look(), now - self._taken, now - self._failed, self._failures
        )
        for vm_id, reason in decision.end.items():
            log.info("the VM %s ends: %s", vm_id, reason)
            self._forget(vm_id).end()
        if decision.why_not and decision.why_not != self._why_not:
            log.warning("fewer VMs wait than wanted: %s", decision.why_not)
        self._why_not = decision.why_not
        if decision.start is not None:
            self._spawn(self._prepare(decision.start))

    def _seen(self, vm: _VM) -> Waiting:
        return Waiting(vm.id, vm.kind, vm.ready, time.monotonic() - vm.born, vm.memory, self._stale(vm))

    def _stale(self, vm: _VM) -> bool:
        if not vm.ready:
            return False
        try:
            return ImageStore().digest_of(vm.spec.image) != vm.image
        except SandboxKernelError:
            return True

    async def _prepare(self, kind: str) -> None:
        """Starts a VM and has it made ready."""
        spec = self._specs[kind]
        ward, control = self._zygote.fork()
        handle = SupervisorHandle(ward, control)
        vm = _VM("p" + os.urandom(5).hex(), kind, spec, ward, control, handle)
        self._vms[vm.id] = vm
        try:
            await ensure_in_loop(spec, Silent())
            report = await asyncio.to_thread(handle.prepare, PrepareRequest(vm.id, spec))
        except SandboxKernelError as error:
            self._failures += 1
            self._failed = time.monotonic()
            log.error("a VM for %s could not be had ready: %s", kind, error)
            if vm.id in self._vms:
                self._forget(vm.id).end()
            return
        self._failures = 0
        vm.image, vm.ready = report["image"], True
        asyncio.get_running_loop().add_reader(ward.fileno(), self._lost, vm.id)
        log.info("the VM %s for %s is ready: %s", vm.id, kind, report["trace"])
        self._wake.set()

    def _lost(self, vm_id: str) -> None:
        """A VM that waited has ended by itself."""
        self._failures += 1
        self._failed = time.monotonic()
        log.warning("the VM %s has ended while it waited", vm_id)
        self._forget(vm_id).end()
        self._wake.set()

    def _forget(self, vm_id: str) -> _VM:
        vm = self._vms.pop(vm_id)
        asyncio.get_running_loop().remove_reader(vm.ward.fileno())
        return vm

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request of one provisioner."""
        connection = writer.get_extra_info("socket")
        try:
            async with asyncio.timeout(_REQUEST):
                line = await reader.readline() if same_user(connection) else b""
            if line:
                self._answer(connection.fileno(), from_line(line))
        except (OSError, ValueError, TimeoutError, SandboxKernelError) as error:
            log.warning("a request to the pool failed: %s", error)
        finally:
            writer.close()

    def _answer(self, fd: int, request: dict[str, Any]) -> None:
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.setblocking(True)
            connection.settimeout(_REQUEST)
            match request.get("op"):
                case "status":
                    connection.sendall(to_line({"ok": True, **self.status()}))
                case "take":
                    self._give(connection, request)
                case op:
                    connection.sendall(to_line({"ok": False, "message": f"There is no request {op!r}."}))

    def _give(self, connection: socket.socket, request: dict[str, Any]) -> None:
        """Gives a VM that fits, or else a supervisor without one, which is still quicker than a new one."""
        ours, theirs = self._surroundings, request.get("surroundings")
        if not isinstance(theirs, dict) or theirs != ours:
            differ = [name for name in ours if not isinstance(theirs, dict) or theirs.get(name) != ours[name]]
            message = f"the pool's surroundings differ ({', '.join(differ)})"
            connection.sendall(to_line({"ok": False, "message": message}))
            return
        vm = self._fitting(request.get("shape"))
        if vm is None:
            try:
                ward, control = self._zygote.fork()
            except HostError as error:
                log.error("%s", error)
                connection.sendall(to_line({"ok": False, "message": str(error)}))
                self._stop.set()
                return
        else:
            ward, control = self._forget(vm.id).ward, vm.control
            self._given += 1
            self._taken = time.monotonic()
            asyncio.get_running_loop().call_later(QUIET + 0.01, self._wake.set)
        with ExitStack() as ours_no_more:
            ours_no_more.callback(ward.close)
            ours_no_more.callback(control.close)
            answer = to_line({"ok": True, "pid": ward.pid, "prepared": vm is not None})
            socket.send_fds(connection, [answer], [control.fileno(), ward.fileno()])

    def _fitting(self, shape: Any) -> _VM | None:
        """The youngest VM that is ready and of that shape."""
        try:
            wanted = VMSpec.from_dict(shape).shape
        except (SandboxKernelError, AttributeError, TypeError):
            return None
        fitting = [
            vm for vm in self._vms.values() if vm.ready and vm.spec.shape == wanted and not self._stale(vm)
        ]
        return max(fitting, key=lambda vm: vm.born, default=None)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._report_failure)

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("the pool failed: %r", task.exception())
            self._stop.set()

    async def _end_all(self) -> None:
        """Ends all that wait, and returns when they have ended and been cleared away."""
        vms = [self._forget(vm_id) for vm_id in list(self._vms)]
        for vm in vms:
            vm.handle.stop()
        await asyncio.gather(*(asyncio.to_thread(vm.handle.wait) for vm in vms))


@contextmanager
def _alone() -> Iterator[Path]:
    """The folder of the socket, for one pool of a user at a time."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(folders.reserved(FOLDER))
        except HostError as error:
            raise HostError(
                "A pool of this user runs already; `sandbox-kernel pool status` shows it."
            ) from error
        yield folder
