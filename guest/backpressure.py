"""Has a kernel wait that publishes faster than its clients take, instead of filling its memory with it.

A stock kernel keeps what it publishes in three places, of which none counts bytes: a stream's text until it
is flushed, the events for the thread that publishes, and its socket. So a cell that floods its output makes a
backlog of any size, and when it is interrupted all of that still comes before the end of the cell. With this,

    a stream is flushed when it has `_UNFLUSHED` characters, and whoever writes waits for that
    whoever publishes waits while more than `_EVENTS` messages are before its own
    the socket keeps `MESSAGES` messages, and a large one is sent before the next is begun

Control's thread waits for none of this: an interrupt, a debugger, a shutdown go first.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream

MESSAGES = 64
"""What the publishing socket keeps (ZMQ_SNDHWM)."""
_EVENTS = 64
_UNFLUSHED = 4 * 1024 * 1024
_LARGE = 1024 * 1024
_LOOK = 0.002
_CONTROL = "Control"
"""Name of the thread of control (ipykernel.control)."""


class Publisher(zmq.Socket[bytes]):
    """An XPUB that has sent a large message when `send_multipart` returns, as far as libzmq can tell."""

    def send_multipart(
        self, msg_parts: Any, flags: int = 0, copy: bool = True, track: bool = False, **options: Any
    ) -> Any:
        """zmq's."""
        parts = list(msg_parts)
        if sum(map(len, parts)) < _LARGE:
            return super().send_multipart(parts, flags, copy, track, **options)
        tracker = super().send_multipart(parts, flags, copy=False, track=True)
        while tracker is not None and not tracker.done:
            time.sleep(_LOOK)
        return None


def install() -> None:
    """Has ipykernel's thread for iopub, and its streams, work like this in this process."""
    send_multipart: Any = IOPubThread.send_multipart
    write: Any = OutStream.write

    def send_and_wait(self: IOPubThread, *args: Any, **options: Any) -> None:
        send_multipart(self, *args, **options)
        here = threading.current_thread()
        if here is self.thread or here.name == _CONTROL:
            return
        while len(self._events) > _EVENTS and self.thread.is_alive():
            time.sleep(_LOOK)

    def write_and_flush(self: Any, string: str) -> int | None:
        written: int | None = write(self, string)
        self._unflushed = getattr(self, "_unflushed", 0) + len(string)
        if self._unflushed > _UNFLUSHED:
            self._unflushed = 0
            self.flush()
        return written

    IOPubThread.send_multipart = send_and_wait  # type: ignore[method-assign]
    OutStream.write = write_and_flush  # type: ignore[method-assign]
