"""Logs that a guest can write to: bounded on disk, with the last lines at hand for an error message.

The serial console and QEMU's standard error are streams whose rate and content the guest decides. A
transcript takes all of them, so that the writer never blocks, keeps the first part on disk and the last
lines in memory, and drops the rest with a notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from sandbox_kernel.paths import LOG_BYTES

log = logging.getLogger(__name__)

IN_MEMORY = 8 * 1024
"""Bytes of the tail kept for error messages."""
_READ = 64 * 1024


class Transcript:
    """Copies a descriptor into a bounded file until its end; owns the descriptor."""

    def __init__(self, fd: int, path: Path, limit: int = LOG_BYTES) -> None:
        """Starts copying in the running event loop.

        Args:
            fd: a readable descriptor; made non-blocking and closed in the end.
            path: the log file, created.
            limit: bytes kept on disk.
        """
        os.set_blocking(fd, False)
        self._fd = fd
        self._path = path
        self._room = limit
        self._tail = b""
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)
        self._awaited: dict[bytes, asyncio.Event] = {}

    async def seen(self, text: str) -> None:
        """Returns once `text` stands in the last lines; never, when the writer ends without it."""
        event = self._awaited.setdefault(text.encode(), asyncio.Event())
        self._announce()
        await event.wait()

    def said(self, text: str) -> bool:
        """Whether `text` stands in the last lines, those that wait to be read among them."""
        if self._fd >= 0:
            self._read()
        return text.encode() in self._tail

    def last_lines(self, count: int = 5) -> str:
        """The last non-empty lines, printable characters only, joined by ` | `; empty when there are none."""
        text = self._tail.decode("utf-8", "replace")
        lines = ("".join(c for c in line if c.isprintable()).strip() for line in text.splitlines())
        return " | ".join([line for line in lines if line][-count:])

    def close(self) -> None:
        """Takes what is still there and closes; idempotent."""
        if self._fd >= 0:
            self._read()
        self._end()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError:  # the peer of a socket is gone
            data = b""
        if not data:
            self._end()
            return
        self._tail = (self._tail + data)[-IN_MEMORY:]
        self._announce()
        if self._room > 0:
            kept = data[: self._room]
            self._room -= len(kept)
            if self._room == 0:
                kept += b"\n[the rest of this log was dropped]\n"
            self._keep(kept)

    def _keep(self, data: bytes) -> None:
        try:
            os.write(self._log, data)
        except OSError as error:
            # A full disk is no reason to stop: the last lines are still in memory.
            self._room = 0
            log.warning("%s is incomplete: %s", self._path, error.strerror)

    def _announce(self) -> None:
        for text, event in self._awaited.items():
            if text in self._tail:
                event.set()

    def _end(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            os.close(self._log)
            self._fd = -1
