"""Where others of the same user may look at a VM: a Unix socket in its folder, which answers and no more.

    runtime/<id>/control    → {"op": "usage"}    ← {"ok": true, "usage": {…}} or {"ok": false, …}

The folder's mode keeps other users out. One request a connection, a few connections at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import ConfigurationError, SandboxKernelError
from sandbox_kernel.supervisor.control import failure, from_line, to_line

log = logging.getLogger(__name__)

SOCKET = "control"
"""In a VM's runtime folder."""
_LINE = 4096
SECONDS = 5.0
"""That an answer may take."""
_AT_A_TIME = 8

Look = Callable[[], Awaitable[dict[str, Any]]]


class Window:
    """The answering end."""

    def __init__(self, folder: Path, look: Look) -> None:
        """Nothing yet; see `open`.

        Args:
            folder: the VM's runtime folder, whose owner removes the socket with it.
            look: gives the usage.
        """
        self._path = folder / SOCKET
        self._look = look
        self._looking = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Answers from now on; where the socket cannot be made, the log says so and the VM goes on."""
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_LINE)
        except OSError as error:
            log.warning("nobody can look at this VM: %s", error)

    async def aclose(self) -> None:
        """Answers no more; idempotent."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._looking += 1
        try:
            if self._looking <= _AT_A_TIME:
                async with asyncio.timeout(SECONDS):
                    writer.write(to_line(await self._answer(await reader.readline())))
                    await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # whoever asked is gone, or does not speak as one should
        finally:
            self._looking -= 1
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            op = from_line(line).get("op")
            if op != "usage":
                raise ConfigurationError(f"There is nothing to see as {op!r}; ask for 'usage'.")
            return {"ok": True, "usage": await self._look()}
        except SandboxKernelError as error:
            return failure(error)
