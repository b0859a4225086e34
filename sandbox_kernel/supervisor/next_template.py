"""The template that a kernel lacked, made for the next one: later than its first cells, and behind them."""

from __future__ import annotations

import asyncio
import logging

from sandbox_kernel.errors import SandboxKernelError
from sandbox_kernel.supervisor.decision import Decision
from sandbox_kernel.template.store import TemplateStore

log = logging.getLogger(__name__)

_AFTER = 5.0
"""Seconds after a cold start."""


async def make_later(decision: Decision) -> None:
    """Makes it, unless it is there or is no use; what stands in the way is logged."""
    await asyncio.sleep(_AFTER)
    if decision.key is None or TemplateStore().open(decision.key) is not None:
        return
    from sandbox_kernel.host.template import make  # which most supervisors have no use for

    try:
        made = await make(TemplateStore(), decision.key, decision.image)
        log.info("template %s", "is being made by somebody else" if made is None else made.digest)
    except SandboxKernelError as error:
        log.warning("%s", error)
