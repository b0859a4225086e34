"""Another kernel on the same host, which runs `1+1` over and over: how long does it take meanwhile?

A process of its own, so that what happens to the attacker's client is no delay of the neighbour's.

    python -m tests.adversarial.neighbour     lines of JSON: {"ready": true}, then a list of seconds for each
                                              line on standard input, what was measured since the last one
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import IO

from tests.microvm import READY, microvm

PAUSE = 0.01
"""Seconds between two cells: a person's kernel sleeps most of the time."""


class Neighbour:
    """The process, as the tests see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adversarial.neighbour"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._output.readline() == '{"ready": true}\n'

    @property
    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def latencies(self) -> list[float]:
        """Seconds of each `1+1` since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._output.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(READY)


def p99(latencies: list[float]) -> float:
    """The value that 99 of 100 do not exceed; of fewer than 200, all but one: no single one decides."""
    beyond = max(1, len(latencies) // 100)
    return sorted(latencies)[max(0, len(latencies) - 1 - beyond)]


def main() -> None:
    with microvm() as kernel:
        measured: list[float] = []
        over = threading.Event()

        def measure() -> None:
            while not over.is_set():
                began = time.monotonic()
                shown = kernel.run("1+1", timeout=READY)
                # Of a thousand results IPython says that it forgets the first ones.
                assert shown.endswith("2"), f"1+1 is {shown!r}"
                measured.append(time.monotonic() - began)
                time.sleep(PAUSE)

        for _ in range(20):
            kernel.run("1+1")
        thread = threading.Thread(target=measure)
        thread.start()
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            while not measured and thread.is_alive():
                time.sleep(PAUSE)
            taken, measured[:] = measured[:], []
            print(json.dumps(taken), flush=True)
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
