"""The supervisor: everything that happens to one VM, in order, in one asyncio process.

    prepare  folders and guardian → machine boots → relay attaches; only for a VM that is to wait for a kernel
    launch   the same with relay binds before → agent starts the kernel → relay attaches and forwards; of a
             kernel that a template had ready the client is told before the last step, which cannot but come
    run      forwards signals; waits for the first of: client gone, stop asked for, kernel ended, VM ended
    end      truthful death report if the end was not orderly → machine stops → relay closes → process exits

Files and cgroup are then removed by the guardian (jail/guardian.py), which needs no cooperation from here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox_kernel.agent.client import KernelExit
from sandbox_kernel.death import Death
from sandbox_kernel.errors import (
    BootError,
    ConfigurationError,
    GuestError,
    GuestProtocolError,
    HostError,
    KernelStartError,
    SandboxKernelError,
    TemplateError,
)
from sandbox_kernel.exposure import parse as parse_exposure
from sandbox_kernel.files.server import require
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.mount import parse
from sandbox_kernel.relay.limits import RelayLimits
from sandbox_kernel.relay.relay import ClientEndpoints, Relay
from sandbox_kernel.spec import LIMITS, VMSpec
from sandbox_kernel.supervisor import causes, expiry, next_template, usage
from sandbox_kernel.supervisor.attached import Attached
from sandbox_kernel.supervisor.beginning import Beginning, begin
from sandbox_kernel.supervisor.control import LaunchRequest, PrepareRequest, addresses
from sandbox_kernel.supervisor.decision import decide
from sandbox_kernel.supervisor.first import Begun
from sandbox_kernel.supervisor.guest_kernel import GuestKernel
from sandbox_kernel.supervisor.ladder import TimeLadder
from sandbox_kernel.supervisor.network_policy import NetworkPolicy
from sandbox_kernel.supervisor.operations import operations
from sandbox_kernel.supervisor.ports import Ports
from sandbox_kernel.supervisor.shares import Shares
from sandbox_kernel.supervisor.usage import Usage
from sandbox_kernel.supervisor.window import Window
from sandbox_kernel.trace import Trace
from sandbox_kernel.volume import parse as parse_volume

if TYPE_CHECKING:
    from sandbox_kernel.network.network import Network

log = logging.getLogger(__name__)

_DRAIN = 2.0
_SIGNAL = 10.0


@dataclass(frozen=True)
class Ending:
    """How a VM came to its end.

    Attributes:
        status: exit status for the supervisor's process, what Jupyter sees as the kernel's.
        death: why; None when the client has asked for it.
    """

    status: int
    death: Death | None = None


class Supervisor:
    """One VM and its kernel."""

    def __init__(self, control_fd: int, begun: Begun | None = None) -> None:
        """A supervisor for one client.

        Args:
            control_fd: this end of the client's socket; the guardian holds it, too.
            begun: what has come of the first request so far.
        """
        self._control_fd = control_fd
        self._begun = begun
        self._stack = AsyncExitStack()
        self._trace = begun.trace if begun is not None else Trace()
        self._relay = Relay()
        if begun is not None and begun.beginning is not None:
            self._stack.push_async_callback(begun.beginning.aclose)
        self._stack.push_async_callback(self._relay.aclose)
        self._beginning: Beginning | None = None
        self._machine: Machine | None = None
        self._kernel: GuestKernel | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._shares: Shares | None = None
        self._network: Network | None = None
        self._opening: asyncio.Task[None] | None = None
        self._attached = Attached()
        self._stack.callback(self._attached.close)
        self._ports: Ports | None = None
        self._idle: list[asyncio.Task[None]] = []
        self._pooled = False
        self._orderly = False
        self._launched = 0.0
        self._request: LaunchRequest | None = None
        self._policy: NetworkPolicy | None = None
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """Resolved when the VM is to end; the caller then calls `close`."""

    async def prepare(self, request: PrepareRequest) -> dict[str, Any]:
        """Has a VM ready whose kernel nobody wants yet: restored, connected, and rehearsed; or loaded only.

        Returns:
            As `launch`.

        Raises:
            SandboxKernelError: as `launch`.
        """
        async with self._in_time(request.spec.boot_timeout):
            beginning = await self._begin(request.id, request.spec, request.asleep)
            if request.asleep:
                await beginning.load(self._trace)
            else:
                machine = await self._start_machine(beginning)
                if machine.restored:
                    await self._kernel_of(machine).rehearse(request.spec)
                self._pooled = True
            self._trace.mark("prepared")
            machine = self._machine = beginning.machine
            self._idle = [
                self._watch(machine.ended, self._on_machine_ended),
                self._watch(self._relay.failed, self._on_machine_ended),
            ]
            return self._report()

    async def launch(self, request: LaunchRequest) -> dict[str, Any]:
        """Boots the VM, if it is not ready yet, and starts the kernel in it.

        Returns:
            What the client may want to know: choices made, seconds of each phase, process ids.

        Raises:
            ConfigurationError: the VM that is ready is not the one that is asked for.
            SandboxKernelError: with a sentence for the user; the VM's logs are then kept.
        """
        async with self._in_time(request.spec.boot_timeout):
            mounts = [parse(text) for text in request.spec.mounts]
            for mount in mounts:
                require(mount)
            await self._attached.hold([parse_volume(text) for text in request.spec.volumes])
            if self._machine is None:
                beginning = await self._begin(request.id, request.spec)
            else:
                self._trace.restart(request.began)
                beginning = self._assign(request)
            ports = self._ports = Ports(beginning.belongings, request.max_expose, self._on_machine_ended)
            self._stack.push_async_callback(ports.aclose)
            ports.listen(map(parse_exposure, request.spec.expose))
            self._bind(request)
            if beginning.starting is None:
                self._stop_idling()  # how a start goes is for the start to say
            machine = await self._start_machine(beginning, request.spec)
            kernel = self._kernel_of(machine)
            shares = self._shares = Shares(
                machine, beginning.belongings.cgroup, request.mount_roots, self._say
            )
            self._stack.push_async_callback(shares.aclose)
            try:
                volumes = await self._attached.plug_in(machine)
                await kernel.start(request, await shares.begin(mounts), volumes)
            except GuestError as error:
                raise shares.explain(error) from error
            if self._opening is not None:
                await self._opening
                self._trace.mark("network ready")
            if not kernel.adopted:
                await kernel.connect()
            ports.open(machine)
            self._stop_idling()
            self._watch(machine.ended, self._on_machine_ended)
            self._watch(self._relay.failed, self._on_machine_ended)
            self._watch(kernel.exit, self._on_kernel_exit)
        self._launched, self._request = time.monotonic(), request
        self._policy = NetworkPolicy(self._network, request.spec, request.network_caps)
        machine.on_trouble = self._tell
        self._keep_time(machine, request.spec)
        if kernel.adopted:
            self._connecting = self._task(self._connect_later(kernel, request.spec.boot_timeout))
        if not machine.restored:
            self._task(next_template.make_later(beginning.decision))
        return self._report()

    async def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group in the guest; False when there is none any more."""
        assert self._machine is not None
        if self.ended.done():
            return False
        if number == signal.SIGINT:
            self._relay.hasten()
        try:
            with self._costs_the_vm():
                async with asyncio.timeout(_SIGNAL):
                    return await (await self._machine.reachable_agent()).signal(number)
        except GuestError as error:
            if await self._machine.cause_of(error) is error:
                raise
            return False  # the VM has just ended

    async def usage(self) -> Usage:
        """What this VM uses; without what does not answer."""
        machine, request, policy = self._machine, self._request, self._policy
        assert machine is not None
        assert request is not None
        assert policy is not None
        with self._costs_the_vm():
            guest, disk = await asyncio.gather(usage.of_guest(machine), usage.of_disk(machine))
        host = usage.of_host(machine)
        return Usage(
            id=request.id,
            kernel=request.kernel[:80],
            start=self._how(machine),
            state="busy" if self._relay.running else "idle",
            uptime=round(time.monotonic() - self._launched, 1),
            cells=self._relay.cells,
            supervisor=os.getpid(),
            client=request.client,
            cpu=host.cpu,
            memory=host.memory,
            memory_peak=host.peak,
            disk=disk,
            network=await usage.of_network(self._network),
            guest=guest,
            limits={name: getattr(policy.spec, name) for name in LIMITS},
            exposed=self._exposed(),
        )

    async def open_window(self) -> None:
        """Lets others of this user reach the VM from now on."""
        assert self._beginning is not None
        assert self._machine is not None
        assert self._shares is not None
        assert self._ports is not None
        assert self._policy is not None
        table = operations(
            *(self._machine, self._shares, self._ports, self._policy),
            *(self._logs(), self.usage, self._costs_the_vm),
        )
        window = Window(self._beginning.belongings.runtime, table)
        self._stack.push_async_callback(window.aclose)
        await window.open()

    def _exposed(self) -> list[dict[str, int | str]]:
        """The exposed ports and where they are."""
        return [each.to_dict() for each in self._ports.exposures] if self._ports is not None else []

    async def status(self) -> dict[str, Any]:
        """What the agent reports of the kernel and the guest's memory, and how the start went so far.

        Waits for the relay to have its channels, for some seconds.
        """
        assert self._machine is not None
        if self._connecting is not None:
            await asyncio.wait((self._connecting,), timeout=_SIGNAL)
        with self._costs_the_vm():
            status = await (await self._machine.reachable_agent()).status()
        return {"guest": status.to_dict(), "trace": self._trace.phases}

    def end(self, ending: Ending, orderly: bool = False) -> None:
        """Asks for the end; the first ending counts."""
        if not self.ended.done():
            self._orderly = orderly
            self.ended.set_result(ending)

    def keep_logs(self) -> None:
        """The logs are named in an error and shall outlive the VM."""
        if self._beginning is not None:
            self._beginning.belongings.keep_logs()

    async def close(self) -> None:
        """Tells the truth to whoever waits for an answer, then releases everything; idempotent."""
        ending = self.ended.result() if self.ended.done() else Ending(1)
        if ending.death is not None and not self._orderly:
            await self._relay.report_death(ending.death)
        if self._machine is not None:
            await self._attached.freeze(self._machine)
        await self._stack.aclose()

    @asynccontextmanager
    async def _in_time(self, seconds: float) -> AsyncIterator[None]:
        """Gives up after `seconds`; makes a sentence for the user of whatever goes wrong."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            self.keep_logs()
            raise BootError(
                "The kernel did not accept connections within "
                f"boot_timeout = {seconds:g} s ({self._evidence()}); "
                "raise boot_timeout if this machine is only slow."
            ) from error
        except OSError as error:
            raise causes.of_the_host(error) from error
        except TemplateError:
            raise  # of a VM that nobody has yet; with another one the kernel starts all the same
        except KernelStartError as error:
            self.keep_logs()
            raise KernelStartError(f"{str(error).removesuffix('.')} ({self._evidence()}).") from error
        except (HostError, GuestError):
            self.keep_logs()
            raise

    async def _begin(self, vm: str, spec: VMSpec, asleep: bool = False) -> Beginning:
        """Begins the VM, unless that has been done."""
        if self._begun is not None:
            beginning = self._begun.take()
        else:
            beginning = begin(vm, await decide(spec), self._control_fd, self._trace, asleep)
        self._beginning = beginning
        self._stack.push_async_callback(beginning.aclose)
        beginning.belongings.watch_guardian(asyncio.get_running_loop())
        return beginning

    def _cell(self) -> str:
        """Id of the request whose cell runs; empty when none does."""
        return next((cell.request.id for cell in self._relay.running), "")

    def _assign(self, request: LaunchRequest) -> Beginning:
        """Makes a VM that is ready the one of `request`."""
        assert self._beginning is not None
        if request.spec.shape != self._beginning.decision.spec.shape:
            raise ConfigurationError(
                "The VM that is ready has another configuration than the kernel asks for; launch a new one."
            )
        self._beginning.check_fresh()
        self._beginning.belongings.rename(request.id)
        log.info("this VM is now %s's", request.id)
        return self._beginning

    def _bind(self, request: LaunchRequest) -> None:
        info, spec = request.connection, request.spec
        self._relay.limit(RelayLimits.of(spec.output, spec.message_size, spec.message_rate))
        self._relay.notice = request.notice
        self._relay.bind(_endpoints(info), info["key"].encode(), info["signature_scheme"])
        self._trace.mark("endpoints bound")

    def _report(self) -> dict[str, Any]:
        machine = self._machine
        assert machine is not None
        assert self._beginning is not None
        decision = self._beginning.decision
        return {
            "id": self._request.id if self._request is not None else "",
            "accelerator": [decision.accelerator, decision.why["accelerator"]],
            "vsock": [decision.vsock, decision.why["vsock"]],
            "image": decision.image.digest,
            "guest_kernel": decision.image.manifest.kernel,
            "logs": self._logs(),
            "start": self._how(machine),
            "trace": self._trace.phases,
            "exposed": self._exposed(),
        }

    def _how(self, machine: Machine) -> str:
        """How the VM came to be."""
        return "cold" if not machine.restored else "pooled" if self._pooled else "restored"

    async def _start_machine(self, beginning: Beginning, spec: VMSpec | None = None) -> Machine:
        """Waits until a VM that was begun has started; boots another one if its template is of no use.

        Args:
            beginning: what was begun.
            spec: of the kernel that is launched, whose policy the network is opened to meanwhile; None for a
                VM that is nobody's yet.
        """
        try:
            if beginning.starting is None:
                await beginning.attend(self._trace)
            assert beginning.starting is not None
            self._machine = machine = beginning.machine
            network = self._network = beginning.network
            if network is not None and spec is not None:
                network.report_to(self._cell, self._say, self._tell)
                self._opening = self._task(network.apply(spec.policy))
            await beginning.starting
            if network is not None:
                network.plugged()
        except TemplateError as error:
            await beginning.boot_instead(error, self._trace)
            return await self._start_machine(beginning, spec)
        return machine

    def _keep_time(self, machine: Machine, spec: VMSpec) -> None:
        """Has the limits of time hold that `spec` sets."""
        if spec.lifetime:
            self._task(expiry.lifetime(spec.lifetime, self._end_over))
        if spec.idle_timeout:
            relay = self._relay
            self._task(
                expiry.idleness(
                    spec.idle_timeout, lambda: None if relay.running else relay.used, self._end_over
                )
            )
        if spec.cell_timeout:
            ladder = TimeLadder(
                spec.cell_timeout, spec.cell_grace, machine.connect_agent, self._relay.say, self._end_over
            )
            self._stack.push_async_callback(ladder.aclose)
            self._relay.watch(ladder)

    def _tell(self, trouble: str) -> None:
        """Tells the log, and whoever runs a cell now, or else next, of what went wrong on the host."""
        log.warning("%s", trouble)
        self._say(trouble)

    def _say(self, trouble: str) -> None:
        """Tells whoever runs a cell now, or else next."""
        running = self._relay.running
        for cell in running:
            self._relay.say(cell.request.header, trouble)
        if not running:
            self._relay.notice = f"{self._relay.notice} {trouble}".lstrip()

    def _stop_idling(self) -> None:
        """Whoever waits for a VM's end while it is nobody's does not any more."""
        for task in self._idle:
            task.cancel()
        self._idle = []

    def _kernel_of(self, machine: Machine) -> GuestKernel:
        """The machine's kernel, always the same."""
        if self._kernel is None:
            self._kernel = GuestKernel(machine, self._relay, self._trace)
            self._stack.push_async_callback(self._kernel.aclose)
        return self._kernel

    async def _connect_later(self, kernel: GuestKernel, seconds: float) -> None:
        """Connects the relay for a client that has been answered; what goes wrong ends the VM."""
        try:
            async with self._in_time(seconds):
                await kernel.connect()
        except Exception as error:
            await self._on_error(error)

    async def _on_kernel_exit(self, result: KernelExit) -> None:
        log.info("the kernel ended: %s", result)
        await self._relay.drain(_DRAIN)
        if self._relay.shutdown_requested:
            self.end(Ending(result.status))
        else:
            self._end_over(causes.of_exit(result, self._memory()), result.status, result.deliberate)

    @contextmanager
    def _costs_the_vm(self) -> Iterator[None]:
        """A guest that breaks a protocol in here loses its VM over it."""
        try:
            yield
        except GuestProtocolError as error:
            self._on_machine_ended(error)
            raise

    def _on_machine_ended(self, error: SandboxKernelError) -> None:
        self.keep_logs()
        self._end_over(error)

    def _end_over(self, error: SandboxKernelError, status: int = 1, by_user_code: bool = False) -> None:
        """Ends the VM, with `error` as the reason that is told."""
        uptime = time.monotonic() - self._launched if self._launched else 0.0
        self.end(Ending(status, Death.of(error, uptime, by_user_code)))

    def _watch(
        self, awaitable: asyncio.Future[Any], then: Callable[[Any], Awaitable[None] | None]
    ) -> asyncio.Task[None]:
        """Runs `then` with the result of `awaitable`; an error in either ends the VM."""

        async def watch() -> None:
            try:
                following = then(await asyncio.shield(awaitable))
                if following is not None:
                    await following
            except Exception as error:
                await self._on_error(error)

        return self._task(watch())

    async def _on_error(self, error: Exception) -> None:
        """Ends the VM over what went wrong in a task that nobody waits for."""
        if not isinstance(error, SandboxKernelError):
            log.error("the supervisor failed", exc_info=error)
            error = HostError(f"The supervisor failed ({error!r}); logs: {self._logs()}.")
        self._on_machine_ended(error if self._machine is None else await self._machine.cause_of(error))

    def _task(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)

        async def finish() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(finish)
        return task

    def _memory(self) -> int:
        """MiB of the guest's RAM."""
        return self._beginning.decision.spec.memory if self._beginning is not None else 0

    def _logs(self) -> str:
        """Folder of the VM's logs; empty when there is none yet."""
        return str(self._beginning.belongings.logs) if self._beginning is not None else ""

    def _evidence(self) -> str:
        console = self._machine.console_tail() if self._machine is not None else ""
        return f"console: {console}; logs: {self._logs()}" if console else f"logs: {self._logs()}"


def _endpoints(info: Mapping[str, Any]) -> ClientEndpoints:
    public, secret = info.get("curve_publickey"), info.get("curve_secretkey")
    return ClientEndpoints(
        addresses(info),
        curve_publickey=public.encode() if public else None,
        curve_secretkey=secret.encode() if secret else None,
    )
