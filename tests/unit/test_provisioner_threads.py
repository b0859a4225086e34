"""Blocking calls of the provisioner."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from sandbox_kernel.provisioner.threads import in_thread


async def test_the_result_or_the_error_comes_back_and_the_loop_goes_on_meanwhile() -> None:
    gate = threading.Event()
    waiting = asyncio.ensure_future(in_thread(gate.wait, 10))
    await asyncio.sleep(0)
    gate.set()
    assert await waiting
    with pytest.raises(ValueError, match="no"):
        await in_thread(_fail)


def _fail() -> None:
    raise ValueError("no")


def test_it_works_in_a_forked_child_that_goes_on_with_its_parents_loop() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(loop.run_in_executor(None, int))  # the pool whose threads the child will lack
    assert loop.run_until_complete(in_thread(os.getpid)) == os.getpid()
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = loop.run_until_complete(asyncio.wait_for(in_thread(os.getpid), 10)) == os.getpid()
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
