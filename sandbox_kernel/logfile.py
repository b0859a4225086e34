"""The logs of a VM: bounded, because a guest decides how much there is to say, and no reason to fail."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

from sandbox_kernel.paths import LOG_BYTES


class LogFile(logging.handlers.RotatingFileHandler):
    """A file that starts anew, with its predecessor beside it, at half of what a log may have on disk."""

    def __init__(self, path: Path) -> None:
        """Opens `path` for this process's log."""
        super().__init__(path, maxBytes=LOG_BYTES // 2, backupCount=1)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._announced = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Says once on standard error that the log is incomplete; the kernel does not depend on it."""
        if not self._announced:
            self._announced = True
            print(
                f"sandbox-kernel: the log {self.baseFilename} is incomplete ({sys.exc_info()[1]}).",
                file=sys.stderr,
                flush=True,
            )


def log_to(file: Path) -> None:
    """Sends everything that is logged in this process to `file`, from level INFO on."""
    root = logging.getLogger()
    root.addHandler(LogFile(file))
    root.setLevel(logging.INFO)
