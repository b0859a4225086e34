"""The time ladder: what happens to a cell that runs for longer than one may.

    cell_timeout      the kernel is interrupted, as by a person
    + cell_grace      what its threads are doing is shown in the cell's output
    + cell_grace      the VM ends, with a CellTimeLimitExceeded

Each step is told in the cell's output. The clock is the host's and starts when it is the cell's turn
(relay/pending.py); a cell that waits for input runs, too. No step waits for the guest: one that does not take
its interrupt, or has no stacks to show, goes on to the next step.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.errors import CellTimeLimitExceeded, SandboxKernelError
from sandbox_kernel.relay.pending import Unanswered

log = logging.getLogger(__name__)

T = TypeVar("T")


class TimeLadder:
    """Watches the cells of one kernel."""

    def __init__(
        self,
        limit: float,
        grace: float,
        agent: Callable[[], Awaitable[AgentClient]],
        say: Callable[[bytes, str], None],
        end: Callable[[CellTimeLimitExceeded], None],
    ) -> None:
        """Watches nothing yet; the relay tells it of cells.

        Args:
            limit: seconds that a cell may run.
            grace: seconds between two steps.
            agent: gives a connection to the guest's agent of one's own.
            say: shows a sentence in the output of the cell with that header.
            end: ends the VM.
        """
        self._limit, self._grace = limit, grace
        self._agent, self._say, self._end = agent, say, end
        self._timers: dict[Unanswered, asyncio.TimerHandle] = {}
        self._climbing: dict[Unanswered, asyncio.Task[None]] = {}

    def began(self, cell: Unanswered) -> None:
        """The cell's time runs from now on."""
        self._timers[cell] = asyncio.get_running_loop().call_later(self._limit, self._start, cell)

    def ended(self, cell: Unanswered) -> None:
        """Its time is over, or it has been in time."""
        timer, task = self._timers.pop(cell, None), self._climbing.pop(cell, None)
        if timer is not None:
            timer.cancel()
        if task is not None:
            task.cancel()

    async def aclose(self) -> None:
        """Watches nothing any more; idempotent."""
        tasks = list(self._climbing.values())
        for cell in [*self._timers, *self._climbing]:
            self.ended(cell)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, cell: Unanswered) -> None:
        self._climbing[cell] = asyncio.get_running_loop().create_task(self._climb(cell))

    async def _climb(self, cell: Unanswered) -> None:
        header, limit, grace = cell.request.header, self._limit, self._grace
        loop = asyncio.get_running_loop()
        begun = loop.time()
        log.warning("a cell has run for %g s and is interrupted", limit)
        self._say(header, f"The cell has run for its time limit of {limit:g} s and is interrupted.")
        trouble = await self._ask(lambda agent: agent.signal(signal.SIGINT))
        if isinstance(trouble, str):
            self._say(header, f"The guest did not take the interrupt: {trouble}.")
        await asyncio.sleep(begun + grace - loop.time())
        log.warning("the cell did not end within %g s of its interrupt", grace)
        stacks = await self._ask(lambda agent: agent.stacks())
        self._say(
            header,
            f"The cell did not end within {grace:g} s of its interrupt, and has another {grace:g} s before "
            f"its VM is ended. What the kernel's threads are doing:\n{stacks or 'it does not say'}",
        )
        await asyncio.sleep(begun + 2 * grace - loop.time())
        assert cell.since is not None
        self._end(
            CellTimeLimitExceeded(
                f"The cell ran for longer than its time limit of {limit:g} s and did not end when it was "
                "interrupted, so its VM was ended; have it do less at a time, or raise `cell_timeout`.",
                limit,
                "s",
                round(time.monotonic() - cell.since, 1),
            )
        )

    async def _ask(self, do: Callable[[AgentClient], Awaitable[T]]) -> T | str:
        """What the agent gives, within the grace; or what was wrong."""
        try:
            async with asyncio.timeout(self._grace):
                agent = await self._agent()
                try:
                    return await do(agent)
                finally:
                    await agent.aclose()
        except TimeoutError:
            return "it did not answer in time"
        except (SandboxKernelError, OSError) as error:
            return str(error).removesuffix(".")
