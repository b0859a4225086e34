"""Where others of the same user reach a VM that has a client: a Unix socket in its folder.

    runtime/<id>/control    → {"op": name, …}    ← {"ok": true, …} or {"ok": false, "error": …, "message": …}

One request a connection, a few connections at a time; which operations there are, the supervisor says. With
some answers goes a descriptor (SCM_RIGHTS), as bulk data does not pass through here. The folder's mode keeps
other users out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import ConfigurationError, SandboxKernelError
from sandbox_kernel.supervisor.control import failure, from_line, to_line

log = logging.getLogger(__name__)

SOCKET = "control"
"""In a VM's runtime folder."""
_LINE = 64 * 1024
SECONDS = 5.0
"""That an answer may take which only tells something."""
PATIENCE = 60.0
"""Seconds for one that changes something."""
_AT_A_TIME = 8


@dataclass(frozen=True)
class Handover:
    """An answer that is a connection: it is the asking process' from then on, and not this one's any more."""

    connection: socket.socket


Operation = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any] | Handover]]
"""Takes the request, returns what the answer has beside `ok`."""


class Window:
    """The answering end."""

    def __init__(self, folder: Path, operations: Mapping[str, Operation]) -> None:
        """Nothing yet; see `open`.

        Args:
            folder: the VM's runtime folder, whose owner removes the socket with it.
            operations: by name.
        """
        self._path = folder / SOCKET
        self._operations = operations
        self._answering = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Answers from now on; where the socket cannot be made, the log says so and the VM goes on."""
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_LINE)
        except OSError as error:
            log.warning("this VM can be seen by its client only: %s", error)

    async def aclose(self) -> None:
        """Answers no more; idempotent."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._answering += 1
        try:
            if self._answering <= _AT_A_TIME:
                async with asyncio.timeout(SECONDS):
                    line = await reader.readline()
                async with asyncio.timeout(PATIENCE):
                    answer = await self._answer(line)
                    if isinstance(answer, Handover):
                        _hand_over(writer, answer)
                    else:
                        writer.write(to_line(answer))
                        await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # whoever asked is gone, or does not speak as one should
        finally:
            self._answering -= 1
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any] | Handover:
        try:
            request = from_line(line)
            operation = self._operations.get(str(request.get("op")))
            if operation is None:
                raise ConfigurationError(
                    f"A VM has no operation {str(request.get('op'))[:40]!r}; there are "
                    f"{', '.join(self._operations)}."
                )
            answer = await operation(request)
            return answer if isinstance(answer, Handover) else {"ok": True, **answer}
        except SandboxKernelError as error:
            return failure(error)


def _hand_over(writer: asyncio.StreamWriter, answer: Handover) -> None:
    """Sends the descriptor with the only line that this connection carries, for which there is room."""
    with answer.connection, socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as peer:
        socket.send_fds(peer, [to_line({"ok": True})], [answer.connection.fileno()])
