"""What the kernel writes to its standard output and error: the end is kept, some of it goes to the console.

ipykernel's cells do not print here; C libraries, crashes and a kernel that fails to start do. The pipe is
always emptied, so that a flood blocks nobody, but the console (a serial line, and a file on the host) gets an
allowance only.
"""

from __future__ import annotations

import os
import threading
import time

_TAIL = 4096
_BURST = 64 * 1024
_RATE = 4 * 1024
_CUT = b"\n[sandbox-kernel: more was printed than the console takes]\n"


class Allowance:
    """How many bytes may pass: `burst` at once, `rate` a second in the long run."""

    def __init__(self, burst: int, rate: int, now: float) -> None:
        self._burst, self._rate = burst, rate
        self._left, self._at = float(burst), now

    def take(self, count: int, now: float) -> int:
        """How many of `count` bytes may pass at the time `now`, in seconds."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        granted = min(count, int(self._left))
        self._left -= granted
        return granted


class Tail:
    """The reading end of one kernel's output."""

    def __init__(self, console: int = 1) -> None:
        """`console` is the descriptor that some of it is copied to."""
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._console = console
        self._text = b""
        self._ended = threading.Event()
        threading.Thread(target=self._copy, daemon=True).start()

    def close_writer(self) -> None:
        """To be called once the kernel has its copy."""
        os.close(self.writer)

    def text(self, patience: float) -> str:
        """The last characters, once all writers are gone or `patience` seconds have passed."""
        self._ended.wait(patience)
        return self._text.decode("utf-8", "replace")

    def _copy(self) -> None:
        allowance = Allowance(_BURST, _RATE, time.monotonic())
        cut = False
        while data := os.read(self._reader, 65536):
            self._text = (self._text + data)[-_TAIL:]
            granted = allowance.take(len(data), time.monotonic())
            try:
                if granted:
                    os.write(self._console, data[:granted])
                if granted < len(data) and not cut:
                    os.write(self._console, _CUT)
            except OSError:
                pass  # the console is a convenience
            cut = granted < len(data)
        os.close(self._reader)
        self._ended.set()
