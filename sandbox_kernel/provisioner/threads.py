"""Blocking calls from any event loop, in a process that may have been forked.

`asyncio.to_thread` uses the loop's own pool of threads. A child forked from a process with such a pool
(nbclient under a ProcessPoolExecutor, say) inherits the loop and the pool, but none of its threads, and
waits for ever. A thread for each call costs a tenth of a millisecond and has no such memory.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` returns or raises, called in a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # the caller was cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop has been closed, nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=f"sandbox-kernel {function.__name__}", daemon=True).start()
    return await future
