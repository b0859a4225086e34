"""A supervisor's process from its beginning: what is imported when, so that nobody waits for an import.

    begin     few imports: the first request is read, the VM begun; QEMU comes up (first.py, beginning.py)
    attend    asyncio and the machine: QEMU gets what it waits for, until the guest runs
    serve     the relay and all the rest, while the guest wakes up (process.py)

In a process that was forked from a zygote everything has been imported, and the order does not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox_kernel.supervisor import first

if TYPE_CHECKING:
    from sandbox_kernel.supervisor.first import First


def run(control_fd: int) -> int:
    """Runs a supervisor until its VM has ended.

    Args:
        control_fd: this end of the client's socket.

    Returns:
        The kernel's exit status, to be this process's own.
    """
    first.confine()
    request = first.receive(control_fd)
    import asyncio

    if request.begun is not None:
        request.begun.turn()
    return asyncio.run(_live(control_fd, request))


async def _live(control_fd: int, request: First) -> int:
    if request.begun is not None and request.begun.beginning is not None and not request.asleep:
        await request.begun.beginning.attend(request.begun.trace)
    from sandbox_kernel.supervisor import process

    return await process.serve(control_fd, request)
