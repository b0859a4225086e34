"""The beginning of a start: all that can be done before the interpreter has imported what a VM's life needs.

QEMU takes as long to come up as asyncio, ZMQ and the rest take to import, so the two go on at the same time.
What is imported here, and by what this imports, is on every start's critical path.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox_kernel.errors import HostError, TemplateError, TemplateUnsafeError
from sandbox_kernel.machine.ignition import Ignition, MachinePlan, ignite
from sandbox_kernel.network.outset import Outset, set_out
from sandbox_kernel.supervisor.belongings import Belongings
from sandbox_kernel.supervisor.decision import Decision, decide_now
from sandbox_kernel.template.store import Template, TemplateStore
from sandbox_kernel.trace import Trace

if TYPE_CHECKING:
    import asyncio

    from sandbox_kernel.machine.machine import Machine
    from sandbox_kernel.network.network import Network

log = logging.getLogger(__name__)


@dataclass
class Beginning:
    """A VM that has been begun.

    Attributes:
        decision: what it is.
        belongings: what it has on the host.
        ignition: its QEMU, until the machine takes that over.
        outset: of its network, until that takes it over; None where it is to have none.
        starting: its start, which goes on by itself; None before.
        network: its network, through which nothing passes yet; None where it is to have none, and before the
            machine is attended to or loads.
    """

    decision: Decision
    belongings: Belongings
    ignition: Ignition
    outset: Outset | None = None
    starting: asyncio.Task[None] | None = None
    network: Network | None = None
    _machine: Machine | None = None

    @property
    def machine(self) -> Machine:
        """The machine, once it is attended to or has loaded."""
        assert self._machine is not None
        return self._machine

    async def attend(self, trace: Trace) -> Machine:
        """Has the machine start, and returns it when its guest runs, or will not."""
        from asyncio import create_task, wait

        machine = self._of_ignition(trace)
        self.starting = create_task(machine.start())
        running = create_task(machine.running.wait())
        await wait((self.starting, running), return_when="FIRST_COMPLETED")
        running.cancel()
        return machine

    async def load(self, trace: Trace) -> None:
        """Has the machine load its template, and no more; `attend` goes on from there.

        Raises:
            TemplateError: it is of no use.
        """
        await self._of_ignition(trace).load()

    def check_fresh(self) -> None:
        """For a guest that has not run yet: is its template still the one that a new VM would get?

        Raises:
            TemplateError: it is not.
        """
        loaded = self.ignition.plan.template
        if self.starting is not None or loaded is None:
            return
        now = decide_now(self.decision.spec)
        found = TemplateStore().open(now.key) if now is not None and now.key is not None else None
        if found is None or (found.digest, found.created) != (loaded.digest, loaded.created):
            raise TemplateError(
                "The template that the VM waits with is not the present one; launch a new one."
            )

    def _of_ignition(self, trace: Trace) -> Machine:
        from sandbox_kernel.machine.machine import Machine

        if self._machine is None:
            self.network = self._begin_network()
            self._machine = Machine(self.ignition, trace, self.network)
        return self._machine

    def _begin_network(self) -> Network | None:
        spec = self.decision.spec
        if spec.network == "none":
            return None
        from sandbox_kernel.network.network import Network  # which most kernels have no use for

        belongings, services = self.belongings, bool(spec.host_services)
        network = Network(belongings.cgroup, belongings.logs, services, self.outset)
        network.begin()
        return network

    async def aclose(self) -> None:
        """Ends the machine, whatever it has come to; idempotent."""
        from asyncio import gather

        if self.starting is not None:
            self.starting.cancel()
            await gather(self.starting, return_exceptions=True)
        if self._machine is not None:
            await self._machine.stop()
        if self.network is not None:
            await self.network.aclose()
        if self.outset is not None:
            self.outset.abandon()
        self.ignition.abandon()

    async def boot_instead(self, error: TemplateError, trace: Trace) -> None:
        """Starts over without the template, which was of no use."""
        template = self.ignition.plan.template
        assert template is not None
        _boots_instead(error, template)
        await self.aclose()
        self._machine = self.starting = self.network = self.outset = None
        self.ignition = _ignite(self.decision, self.belongings, None, trace)
        await self.attend(trace)


def begin(vm: str, decision: Decision, control_fd: int, trace: Trace, asleep: bool) -> Beginning:
    """Makes what the VM has on the host and starts its QEMU.

    Args:
        vm: the VM's id.
        decision: what it is to be.
        control_fd: see `Belongings`.
        trace: where the phases are noted.
        asleep: whether it is for a VM that waits with its template, without which there is nothing to begin.

    Raises:
        HostError: something is missing, or another living VM has this id.
        TemplateError: there is no template that is of use, for a VM that is asleep.
    """
    trace.mark("decided")
    template = TemplateStore().open(decision.key) if decision.key is not None else None
    if asleep and template is None:
        raise TemplateError("There is no template that a VM could wait with.")
    belongings = Belongings(vm, decision.spec, control_fd)
    for what, why in decision.why.items():
        log.info("%s %s: %s", what, getattr(decision, what), why)
    outset = None
    try:
        with ExitStack() as stack:
            if decision.spec.network != "none":
                outset = set_out(belongings.cgroup)
                stack.callback(outset.abandon)
            try:
                ignition = _ignite(decision, belongings, template, trace)
            except TemplateError as error:
                if asleep:
                    raise
                assert template is not None
                _boots_instead(error, template)
                ignition = _ignite(decision, belongings, None, trace)
            stack.pop_all()
    except TemplateError:
        raise  # of a VM that nobody has yet: there is nothing in its logs that anybody looks for
    except BaseException:
        belongings.keep_logs()
        raise
    return Beginning(decision, belongings, ignition, outset)


def _boots_instead(error: TemplateError, template: Template) -> None:
    """Says that a template was of no use, and removes it if it never will be."""
    log.warning("%s The kernel boots instead.", error)
    if not isinstance(error, TemplateUnsafeError):
        with suppress(HostError):
            TemplateStore().remove(template.digest)


def _ignite(decision: Decision, belongings: Belongings, template: Template | None, trace: Trace) -> Ignition:
    spec = decision.spec
    ignition = ignite(
        MachinePlan(
            decision.image,
            spec.memory,
            spec.vcpus,
            decision.accelerator,
            decision.vsock,
            spec.boot_timeout,
            belongings.logs,
            belongings.cgroup,
            template,
            spec.disk,
            spec.disk_bandwidth,
            spec.disk_iops,
            spec.network != "none",
        )
    )
    trace.mark("QEMU started")
    return ignition
