"""The beginning of a start: all that can be done before the interpreter has imported what a VM's life needs.

QEMU takes as long to come up as asyncio, ZMQ and the rest take to import, so the two go on at the same time.
What is imported here, and by what this imports, is on every start's critical path.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

from sandbox_kernel.errors import HostError, TemplateError, TemplateUnsafeError
from sandbox_kernel.machine.ignition import Ignition, MachinePlan, ignite
from sandbox_kernel.supervisor.belongings import Belongings
from sandbox_kernel.supervisor.decision import Decision
from sandbox_kernel.template.store import Template, TemplateStore
from sandbox_kernel.trace import Trace

log = logging.getLogger(__name__)


@dataclass
class Beginning:
    """A VM that has been begun.

    Attributes:
        decision: what it is.
        belongings: what it has on the host.
        ignition: its QEMU, until a `Machine` takes that over.
    """

    decision: Decision
    belongings: Belongings
    ignition: Ignition

    def abandon(self) -> None:
        """Ends its QEMU, unless a `Machine` has taken that over."""
        self.ignition.abandon()

    def again(self, trace: Trace) -> Ignition:
        """A QEMU that boots instead of being restored."""
        self.ignition = _ignite(self.decision, self.belongings, None, trace)
        return self.ignition


def begin(vm: str, decision: Decision, control_fd: int, trace: Trace) -> Beginning:
    """Makes what the VM has on the host and starts its QEMU.

    Args:
        vm: the VM's id.
        decision: what it is to be.
        control_fd: see `Belongings`.
        trace: where the phases are noted.

    Raises:
        HostError: something is missing, or another living VM has this id.
    """
    trace.mark("decided")
    belongings = Belongings(vm, decision.spec.memory, decision.spec.vcpus, control_fd)
    for what, why in decision.why.items():
        log.info("%s %s: %s", what, getattr(decision, what), why)
    template = TemplateStore().open(decision.key) if decision.key is not None else None
    try:
        ignition = _ignite(decision, belongings, template, trace)
    except TemplateError as error:
        assert template is not None
        boots_instead(error, template)
        ignition = _ignite(decision, belongings, None, trace)
    except BaseException:
        belongings.keep_logs()
        raise
    return Beginning(decision, belongings, ignition)


def boots_instead(error: TemplateError, template: Template) -> None:
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
        )
    )
    trace.mark("QEMU started")
    return ignition
