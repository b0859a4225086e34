"""The time ladder, with an agent that answers, fails or is silent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sandbox_kernel.errors import CellTimeLimitExceeded, GuestError, LimitExceeded
from sandbox_kernel.relay.message import Request
from sandbox_kernel.relay.pending import Unanswered
from sandbox_kernel.supervisor import expiry
from sandbox_kernel.supervisor.ladder import TimeLadder


class FakeAgent:
    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()

    async def _answer(self, what: str, answer: Any) -> Any:
        self.asked.append(what)
        self.was_asked.set()
        if self.behaviour == "fails":
            raise GuestError("The agent is gone.")
        if self.behaviour == "is silent":
            await asyncio.sleep(3600)
        return answer

    async def signal(self, number: int) -> Any:
        return await self._answer(f"signal {number}", True)

    async def stacks(self) -> Any:
        return await self._answer("stacks", 'Thread 1\n  File "<cell>", line 1')

    async def aclose(self) -> None:
        pass


class Scene:
    def __init__(self, behaviour: str = "answers", grace: float = 0.05) -> None:
        self.agent = FakeAgent(behaviour)
        self.said: list[str] = []
        self.over: asyncio.Future[CellTimeLimitExceeded] = asyncio.get_running_loop().create_future()
        self.ladder = TimeLadder(0.05, grace, self._connect, self._say, self.over.set_result)
        self.cell = Unanswered(Request("shell", (), b"header", "id", "execute_request"), since=0.0)

    async def _connect(self) -> Any:
        return self.agent

    def _say(self, header: bytes, text: str) -> None:
        assert header == b"header"
        self.said.append(text)


async def test_a_cell_in_time_hears_nothing() -> None:
    scene = Scene()
    scene.ladder.began(scene.cell)
    scene.ladder.ended(scene.cell)
    await asyncio.sleep(0.2)
    assert (scene.said, scene.agent.asked) == ([], [])


async def test_a_cell_that_takes_the_interrupt_goes_on_to_no_further_step() -> None:
    scene = Scene(grace=5)
    scene.ladder.began(scene.cell)
    await asyncio.wait_for(scene.agent.was_asked.wait(), 5)
    scene.ladder.ended(scene.cell)
    await asyncio.sleep(0.1)
    assert scene.agent.asked == ["signal 2"]
    assert scene.said == ["The cell has run for its time limit of 0.05 s and is interrupted."]
    assert not scene.over.done()


async def test_each_step_is_told_and_the_last_one_ends_the_vm() -> None:
    scene = Scene()
    scene.ladder.began(scene.cell)
    error = await asyncio.wait_for(scene.over, 5)
    assert scene.agent.asked == ["signal 2", "stacks"]
    assert len(scene.said) == 2
    assert scene.said[1].endswith('doing:\nThread 1\n  File "<cell>", line 1')
    assert (error.limit, error.unit) == (0.05, "s")
    assert error.peak is not None
    assert "raise `cell_timeout`" in str(error)
    await scene.ladder.aclose()


@pytest.mark.parametrize("behaviour", ["fails", "is silent"])
async def test_a_guest_that_does_not_play_along_delays_nothing(behaviour: str) -> None:
    scene = Scene(behaviour)
    scene.ladder.began(scene.cell)
    await asyncio.wait_for(scene.over, 1)
    assert scene.said[1].startswith("The guest did not take the interrupt: ")
    await scene.ladder.aclose()


async def test_nobody_is_watched_after_the_end() -> None:
    scene = Scene()
    scene.ladder.began(scene.cell)
    await scene.ladder.aclose()
    await asyncio.sleep(0.2)
    assert scene.said == []


async def test_a_vm_ends_at_its_lifetime() -> None:
    ends: list[LimitExceeded] = []
    await asyncio.wait_for(expiry.lifetime(0.05, ends.append), 5)
    assert str(ends[0]) == (
        "The VM has reached its lifetime of 0.05 s and was ended; start the kernel anew, or raise `lifetime`."
    )


async def test_idleness_counts_from_the_last_use() -> None:
    loop = asyncio.get_running_loop()
    ends: list[LimitExceeded] = []
    used = loop.time()
    busy = True
    task = asyncio.ensure_future(expiry.idleness(0.1, lambda: None if busy else used, ends.append))
    await asyncio.sleep(0.3)
    assert not task.done()
    busy, used = False, loop.time()
    await asyncio.wait_for(task, 5)
    assert loop.time() - used >= 0.1
    assert (ends[0].limit, ends[0].unit) == (0.1, "s")
