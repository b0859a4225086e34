"""When a VM has lived, or lain idle, for long enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sandbox_kernel.errors import IdleTimeLimitExceeded, LifetimeLimitExceeded, LimitExceeded


async def lifetime(seconds: float, end: Callable[[LimitExceeded], None]) -> None:
    """Ends a VM `seconds` from now."""
    await asyncio.sleep(seconds)
    end(
        LifetimeLimitExceeded(
            f"The VM has reached its lifetime of {seconds:g} s and was ended; start the kernel anew, or "
            "raise `lifetime`.",
            seconds,
            "s",
            seconds,
        )
    )


async def idleness(
    seconds: float, since: Callable[[], float | None], end: Callable[[LimitExceeded], None]
) -> None:
    """Ends a VM that has been idle for `seconds`.

    Args:
        seconds: that it may be idle.
        since: since when it is idle (monotonic seconds); None while it is not.
        end: ends it.
    """
    while True:
        began = since()
        idle = 0.0 if began is None else time.monotonic() - began
        if idle >= seconds:
            break
        await asyncio.sleep(seconds - idle)
    end(
        IdleTimeLimitExceeded(
            f"Nobody used the kernel for its idle_timeout of {seconds:g} s, so its VM was ended; start it "
            "anew, or raise `idle_timeout`.",
            seconds,
            "s",
            round(idle, 1),
        )
    )
