"""Saving by what QEMU calls migration: here, of the devices of a VM whose RAM lies in a file.

With the capability `x-ignore-shared` QEMU leaves out RAM that is shared with a file (migration/ram.c of QEMU;
"x-" says that the name may change, the function has been there since 4.0). What is left are some 400 KiB.
How they are loaded again is in qemu/script.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from qemu.qmp import QMPClient

from sandbox_kernel.errors import GuestError
from sandbox_kernel.qemu.script import CAPABILITIES

_POLL = 0.001


async def save(qmp: QMPClient, file: Path) -> None:
    """Writes the devices of a stopped VM to `file`.

    Raises:
        QMPError: QEMU refused.
        GuestError: it did not finish.
    """
    await qmp.execute("migrate-set-capabilities", CAPABILITIES)
    with file.open("wb") as stream:
        qmp.send_fd_scm(stream.fileno())
        await qmp.execute("getfd", {"fdname": "state"})
    await qmp.execute("migrate", {"uri": "fd:state"})
    while (status := await _query(qmp, "query-migrate")) != "completed":
        if status in ("failed", "cancelled"):
            raise GuestError(f"QEMU did not save the VM ({status}).")
        await asyncio.sleep(_POLL)


async def _query(qmp: QMPClient, command: str) -> str:
    return str(cast(dict[str, Any], await qmp.execute(command)).get("status", ""))
