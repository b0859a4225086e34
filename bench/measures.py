"""One function per measure: it takes a kernel and returns samples. `ORDER` is the order in which they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import memory
from bench.figures import Sample
from bench.kernel import DEADLINE, KernelTrouble, Turn

BYTES = 20_000_000
TRIPS = 100
WARM_UP = 20
FLOOD = 5
"""Messages of output after which a flood is under way."""

_STDOUT_LINES = "for _ in range(20_000): print('x' * 999)"
_STDOUT_BLOCKS = "for _ in range(20): print('x' * 999_999)"
_FILE_BYTES = 32_000_000
_FILES = 200
_BODY = 20_000_000
_REQUESTS = 50
_LARGE = {
    "write 32 MB into one file": "with open(folder + '/large', 'wb') as file: file.write(block)",
    "read it": "with open(folder + '/large', 'rb') as file: assert len(file.read()) == len(block)",
}
_SMALL = {
    "write 200 files of 1 kB": "for at in range(200): open(f'{folder}/{at}', 'wb').write(block[:1000])",
    "list and read them": "import os\nfor n in os.listdir(folder): open(f'{folder}/{n}', 'rb').read(1000)",
}
_DISPLAY = "display({'text/plain': 'x' * 20_000_000}, raw=True)"


def start(turn: Turn) -> list[Sample]:
    """From `start_kernel` to the first answer, and to a client that considers the kernel ready."""
    return [
        Sample("start to first kernel_info_reply", "s", (turn.first_reply,)),
        Sample("start to ready (wait_for_ready)", "s", (turn.ready,)),
    ]


def memory_at_ready(turn: Turn) -> list[Sample]:
    """Unique memory before any cell has run."""
    return [_memory(turn, "unique memory, ready")]


def first_import(turn: Turn) -> list[Sample]:
    """The first `import numpy` and a result from it, as the first cell of a fresh kernel."""
    return [Sample("first import numpy", "s", (_timed(turn, "import numpy; numpy.arange(3).sum()"),))]


def round_trip(turn: Turn) -> list[Sample]:
    """`1+1` on a warm kernel: from sending the request until its reply and its `idle` have both come."""
    for _ in range(WARM_UP):
        _timed(turn, "1+1")
    taken = tuple(_timed(turn, "1+1") for _ in range(TRIPS))
    return [
        Sample("1+1 round trip, p50", "s", taken, percentile=50),
        Sample("1+1 round trip, p99", "s", taken, percentile=99),
    ]


def memory_in_use(turn: Turn) -> list[Sample]:
    """Unique memory after NumPy was imported and small cells have run."""
    return [_memory(turn, "unique memory, in use")]


def stdout_lines(turn: Turn) -> list[Sample]:
    """20 MB of stdout in lines of 1,000 bytes: what the kernel's own output code costs, mostly."""
    return [Sample("20 MB of stdout, 20,000 lines", "s", (_streamed(turn, _STDOUT_LINES),))]


def stdout_blocks(turn: Turn) -> list[Sample]:
    """20 MB of stdout in lines of 1,000,000 bytes: what the way to the client costs, mostly."""
    return [Sample("20 MB of stdout, 20 lines", "s", (_streamed(turn, _STDOUT_BLOCKS),))]


def display(turn: Turn) -> list[Sample]:
    """20 MB in one `display_data` message."""
    sizes: list[int] = []

    def on_output(message: dict[str, Any]) -> None:
        if message["msg_type"] == "display_data":
            sizes.append(len(message["content"]["data"]["text/plain"]))

    seconds = _timed(turn, _DISPLAY, on_output)
    _expect(sum(sizes), BYTES)
    return [Sample("20 MB display", "s", (seconds,))]


def files(turn: Turn) -> list[Sample]:
    """A directory of the host, as the kernel has it: one large file, many small ones, written and read."""
    _timed(turn, f"folder, block = {str(turn.folder)!r}, bytes({_FILE_BYTES})")
    found = [Sample(name, "s", (_timed(turn, code),)) for name, code in {**_LARGE, **_SMALL}.items()]
    _expect((turn.folder / "large").stat().st_size, _FILE_BYTES)
    _expect(len(list(turn.folder.iterdir())), _FILES + 1)
    return found


def http(turn: Turn) -> list[Sample]:
    """HTTP to a server of the host: a large body, and many small ones with a connection each."""
    (turn.folder / "body").write_bytes(bytes(_BODY))
    (turn.folder / "piece").write_bytes(bytes(1000))
    _timed(turn, f"from urllib.request import urlopen\nplace = 'http://{turn.server}/'")
    _timed(turn, "urlopen(place + 'piece').read()")
    large = _timed(turn, f"assert len(urlopen(place + 'body').read()) == {_BODY}")
    small = _timed(turn, f"for _ in range({_REQUESTS}): assert len(urlopen(place + 'piece').read()) == 1000")
    return [
        Sample("HTTP, a body of 20 MB", "s", (large,)),
        Sample(f"HTTP, {_REQUESTS} requests", "s", (small,)),
    ]


def interrupt(turn: Turn) -> list[Sample]:
    """From `interrupt_kernel` to the cell's reply, while a cell floods stdout and the client reads."""
    request = turn.send("while True: print('x' * 100)")
    turn.outputs(request, FLOOD)
    began = time.monotonic()
    turn.manager.interrupt_kernel()
    replied = turn.finish(request)
    return [Sample("interrupt of a flood", "s", (replied - began,))]


def shut_down(turn: Turn) -> list[Sample]:
    """From `shutdown_kernel` until it returns, and until none of the kernel's processes is left."""
    processes = memory.group(turn.root)
    turn.client.stop_channels()
    began = time.monotonic()
    turn.manager.shutdown_kernel()
    turn.over = True
    returned = time.monotonic() - began
    while alive := [process.pid for process in processes if _lives(process)]:
        if time.monotonic() > began + DEADLINE:
            raise KernelTrouble(f"Shut down left {alive}.")
        time.sleep(0.005)
    return [
        Sample("shut down", "s", (returned,)),
        Sample("shut down to no process left", "s", (time.monotonic() - began,)),
    ]


ORDER: dict[str, Callable[[Turn], list[Sample]]] = {
    "start": start,
    "memory-at-ready": memory_at_ready,
    "import": first_import,
    "round-trip": round_trip,
    "memory": memory_in_use,
    "stdout-lines": stdout_lines,
    "stdout-blocks": stdout_blocks,
    "display": display,
    "files": files,
    "http": http,
    "interrupt": interrupt,
    "shut-down": shut_down,
}
"""Every measure by its name on the command line."""


def _lives(process: psutil.Process) -> bool:
    """Whether a process still has anything; one that only waits to be reaped, by whoever has to, has not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _timed(turn: Turn, code: str, on_output: Callable[[dict[str, Any]], None] | None = None) -> float:
    """Seconds from sending `code` until its reply and its `idle` have both come.

    Raises:
        KernelTrouble: it failed.
    """
    errors: list[str] = []

    def look(message: dict[str, Any]) -> None:
        if message["msg_type"] == "error":
            errors.append(f"{message['content']['ename']}: {message['content']['evalue']}")
        if on_output is not None:
            on_output(message)

    began = time.monotonic()
    turn.finish(turn.send(code), look)
    seconds = time.monotonic() - began
    if errors:
        raise KernelTrouble(f"A cell failed: {errors[0]}")
    return seconds


def _streamed(turn: Turn, code: str) -> float:
    sizes: list[int] = []

    def on_output(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            sizes.append(len(message["content"]["text"]))

    seconds = _timed(turn, code, on_output)
    _expect(sum(sizes), BYTES)
    return seconds


def _expect(received: int, sent: int) -> None:
    if received != sent:
        raise KernelTrouble(f"Of {sent} (bytes, or files) {received} arrived.")


def _memory(turn: Turn, name: str) -> Sample:
    return Sample(name, "MiB", (sum(memory.measure(turn.root).values()),))
