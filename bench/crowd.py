"""Many live kernels in one process, which itself stays small: all over Jupyter's KernelManager.

A kernel's channels are closed as soon as it has answered, and opened again for the next question. Only the
shell channel is used, and all kernels share one ZMQ context.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

from bench import memory, pool
from bench.kernel import DEADLINE, START, KernelTrouble, expect, traced, variant

_QUESTION, _ANSWER = "1+1", "2"
_TICKS = os.sysconf("SC_CLK_TCK")
_ENDING_AT_ONCE = 8


class Crowd:
    """Kernels of one kind that are alive at the same time."""

    def __init__(self, name: str) -> None:
        """None yet.

        Args:
            name: see `bench.kernel.variant`; who calls sees to it that the environment fits.
        """
        self._kernelspec, self._way = variant(name)
        self._context = zmq.Context()
        self._managers: list[KernelManager] = []
        self._lock = threading.Lock()
        self.traces: list[dict[str, float]] = []
        """Of each VM's start, seconds by phase, in order; see `bench.phases`."""
        self.accelerator = ""
        """Of the VMs; empty for kernels without one."""

    def __len__(self) -> int:
        """How many live."""
        return len(self._managers)

    def add(self) -> float:
        """Starts one more, from any thread, and has it run a cell.

        Returns:
            Seconds from just before the start to the first `kernel_info_reply`.

        Raises:
            KernelTrouble: it started in another way than it was to, or answers wrongly.
        """
        manager = KernelManager(kernel_name=self._kernelspec, context=self._context)
        began = time.monotonic()
        manager.start_kernel(stderr=subprocess.DEVNULL)
        with self._lock:
            self._managers.append(manager)
        client = _connected(manager)
        try:
            client.kernel_info(reply=True, timeout=DEADLINE)
            seconds = time.monotonic() - began
            report = getattr(manager.provisioner, "report", {})
            expect(report, self._way)
            self.accelerator = str(report.get("accelerator", [self.accelerator])[0])
            self.traces.append(traced(manager))
            _ask(client)
        except BaseException:
            with self._lock:
                self._managers.remove(manager)
            manager.shutdown_kernel(now=True)
            raise
        finally:
            client.stop_channels()
        return seconds

    def start_at_once(self, count: int) -> tuple[float, list[float]]:
        """Starts `count` at the same moment, each in a thread of its own.

        Returns:
            Seconds until all have given their first `kernel_info_reply`, and the seconds of each.

        Raises:
            KernelTrouble: as `add`; the first that failed.
        """
        together = threading.Barrier(count)

        def start() -> tuple[float, float, float]:
            together.wait()
            began = time.monotonic()
            try:
                seconds = self.add()
            finally:
                _close_loop()
            return began, began + seconds, seconds

        with ThreadPoolExecutor(count) as threads:
            done = [each.result() for each in [threads.submit(start) for _ in range(count)]]
        wall = max(end for _, end, _ in done) - min(began for began, _, _ in done)
        return wall, [seconds for *_, seconds in done]

    def check(self) -> tuple[list[float], list[str]]:
        """Asks every kernel what 1+1 is.

        Returns:
            Seconds of each right answer from the request to the reply, and a sentence for each other kernel.
        """
        trips, wrong = [], []
        for number, manager in enumerate(self._managers, 1):
            if not manager.is_alive():
                wrong.append(f"kernel {number} of {len(self)} has ended")
                continue
            client = _connected(manager)
            try:
                client.kernel_info(reply=True, timeout=DEADLINE)  # the connection is not part of the trip
                trips.append(_ask(client))
            except (KernelTrouble, TimeoutError, RuntimeError) as error:
                wrong.append(f"kernel {number} of {len(self)}: {error}")
            finally:
                client.stop_channels()
        return trips, wrong

    def memory(self) -> tuple[float, float]:
        """MiB of all kernels together: unique, and with their shares of what is mapped by several (PSS)."""
        pids = self._processes()
        return sum(map(memory.own, pids)), sum(map(memory.share, pids))

    def cpu(self, seconds: float) -> float:
        """Per cent of one core that all kernels use together over `seconds`."""
        pids = self._processes()
        before, began = _ticks(pids), time.monotonic()
        time.sleep(seconds)
        after, took = _ticks(pids), time.monotonic() - began
        return sum(after[pid] - before[pid] for pid in after if pid in before) / _TICKS / took * 100

    def end(self) -> None:
        """Ends all of them."""

        def end(manager: KernelManager) -> None:
            with suppress(Exception):  # one that has died by itself does not keep the others alive
                manager.shutdown_kernel(now=True)
            _close_loop()

        with ThreadPoolExecutor(_ENDING_AT_ONCE) as threads:
            list(threads.map(end, self._managers))
        self._managers.clear()
        self._context.destroy(linger=0)

    @property
    def roots(self) -> list[int]:
        """The processes that the provisioners name, in the order of the starts."""
        pids = [getattr(each.provisioner, "pid", None) for each in self._managers]
        return [pid for pid in pids if pid is not None]

    def _processes(self) -> list[int]:
        return memory.families(self.roots)


@contextmanager
def surroundings(name: str, waiting: int) -> Iterator[pool.Pool | None]:
    """No pool of the user's; one of the bench's own, with `waiting` VMs, where `name` says so."""
    kernelspec, way = variant(name)
    with ExitStack() as stack:
        stack.enter_context(pool.no_pool())
        stack.enter_context(pool.environment({START: "cold" if way == "cold" else "auto"}))
        yield stack.enter_context(pool.running(kernelspec, waiting)) if way == "pooled" else None


def _close_loop() -> None:
    """Closes the event loop that Jupyter's synchronous calls have made for this thread."""
    ensure_event_loop().close()


def _connected(manager: KernelManager) -> BlockingKernelClient:
    client = manager.blocking_client()
    client.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)
    return client


def _ask(client: BlockingKernelClient) -> float:
    """Runs the cell `1+1`; the reply brings the value of the same expression.

    Raises:
        KernelTrouble: there is no answer, or a wrong one.
    """
    began = time.monotonic()
    request = client.execute(_QUESTION, user_expressions={"answer": _QUESTION}, allow_stdin=False)
    while True:
        reply = client.get_shell_msg(timeout=DEADLINE)
        if reply["parent_header"].get("msg_id") == request:
            break
    seconds = time.monotonic() - began
    told = reply["content"].get("user_expressions", {}).get("answer", {}).get("data", {}).get("text/plain")
    if told != _ANSWER:
        raise KernelTrouble(f"To {_QUESTION} a kernel answered {told!r}.")
    return seconds


def _ticks(pids: Iterable[int]) -> dict[int, int]:
    """Time in user and kernel mode by process, in ticks (proc(5), stat, fields 14 and 15)."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = int(words[11]) + int(words[12])
    return found
