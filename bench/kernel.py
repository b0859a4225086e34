"""A started kernel and the few things that measures do with it, over Jupyter's synchronous client."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from bench import pool
from sandbox_kernel.host import template
from sandbox_kernel.host.kernelspec import spec_of
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import nursery

DEADLINE = 120.0
"""Seconds that any single wait may take; a benchmark that hangs says so."""

COLD = ", cold"
POOLED = ", pooled"
FIRST = ", first"
OPEN = ", with files and network"
WAYS = {COLD: "cold", POOLED: "pooled", FIRST: "first", OPEN: "open"}
"""How a VM starts, by what is put behind the kernelspec's name.

Without, it is restored from a template, for a client that has started one before (supervisor/nursery.py);
`OPEN` is the same with `Turn.folder` mounted and a network through which `Turn.server` is reached.
"""
START = "SANDBOX_KERNEL_START"
MOUNTS = "SANDBOX_KERNEL_MOUNTS"
NETWORK = "SANDBOX_KERNEL_NETWORK"
SERVICES = "SANDBOX_KERNEL_HOST_SERVICES"
_FIXES = {
    "cold": "the kernelspec must not set start",
    "restored": "`sandbox-kernel template build` makes the template",
    "pooled": "the client's log tells why the pool's was of no use",
}


class KernelTrouble(Exception):
    """A kernel did not do what was asked of it."""


@dataclass
class Turn:
    """One kernel for one turn.

    Attributes:
        manager: started.
        client: its channels are open.
        folder: a directory of the host for this turn; a VM has it at the same path if it has it mounted.
        server: `host:port` of a web server of the host, as the kernel has to name it, which serves `folder`.
        began: `time.monotonic()` just before the start.
        first_reply: seconds from there to the first `kernel_info_reply`.
        ready: seconds from there to the end of `wait_for_ready`, which ends with 0.2 s of quiet on iopub.
    """

    manager: KernelManager
    client: BlockingKernelClient
    folder: Path
    server: str
    began: float
    first_reply: float = 0.0
    ready: float = 0.0
    over: bool = field(default=False)

    @property
    def report(self) -> dict[str, Any]:
        """What the provisioner tells of the VM; nothing for a kernel without one."""
        return dict(getattr(self.manager.provisioner, "report", {}))

    @property
    def phases(self) -> dict[str, float]:
        """Seconds from the client's request until each phase of a VM's start was done; see `phases`."""
        return traced(self.manager)

    @property
    def accelerator(self) -> str:
        """What the VM runs with; empty for a kernel without a VM."""
        return str(self.report.get("accelerator", [""])[0])

    @property
    def root(self) -> int:
        """The process that the provisioner names: the kernel itself, or the VM's supervisor.

        Raises:
            KernelTrouble: it names none.
        """
        pid = getattr(self.manager.provisioner, "pid", None)
        if not isinstance(pid, int):
            raise KernelTrouble("The provisioner names no process; the kernel is not running.")
        return pid

    def send(self, code: str) -> str:
        """Sends an `execute_request` and returns its id."""
        return str(self.client.execute(code, allow_stdin=False))

    def finish(self, request: str, on_output: Callable[[dict[str, Any]], None] | None = None) -> float:
        """Receives until reply and `idle` of `request` are there; the reply's `time.monotonic()`.

        Both channels are read as messages come, so that no queue fills meanwhile.

        Raises:
            KernelTrouble: they are not there in time.
        """
        replied = 0.0
        idle = False
        for channel, message in self._messages(DEADLINE):
            if message["parent_header"].get("msg_id") != request:
                continue
            if channel == "shell":
                replied = time.monotonic()
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                idle = True
            elif on_output is not None:
                on_output(message)
            if replied and idle:
                return replied
        raise KernelTrouble(f"There was no end to a cell within {DEADLINE:g} s.")

    def outputs(self, request: str, count: int) -> None:
        """Receives until `count` messages with output of `request` have come.

        Raises:
            KernelTrouble: they are not there in time.
        """
        for channel, message in self._messages(DEADLINE):
            mine = message["parent_header"].get("msg_id") == request
            count -= mine and channel == "iopub" and message["msg_type"] == "stream"
            if count <= 0:
                return
        raise KernelTrouble(f"A cell printed nothing within {DEADLINE:g} s.")

    def _messages(self, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Messages on shell and iopub as they come, until `seconds` have passed."""
        channels = {"shell": self.client.shell_channel, "iopub": self.client.iopub_channel}
        poller = zmq.Poller()
        for channel in channels.values():
            poller.register(channel.socket, zmq.POLLIN)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poller.poll(math.ceil(left * 1000)))
            for name, channel in channels.items():
                if channel.socket in ready:
                    yield name, channel.get_msg(timeout=0)


@contextmanager
def started(name: str) -> Iterator[Turn]:
    """A kernel, ready; ended at the end, unless a measure did.

    No pool of the user's is found meanwhile; for `POOLED` one of the bench's own has a VM ready.

    Args:
        name: a kernelspec's, with an ending of `WAYS` behind it; see `variant`.

    Raises:
        KernelTrouble: the kernel did not start in the way that `name` says.
    """
    kernelspec, way = variant(name)
    manager = KernelManager(kernel_name=kernelspec)
    with ExitStack() as stack:
        stack.enter_context(pool.no_pool())
        stack.enter_context(pool.environment({START: "cold" if way == "cold" else "auto"}))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        port = stack.enter_context(_web_server(folder))
        if way == "open":
            given = {MOUNTS: f"{folder}:{folder}:rw", NETWORK: "allowlist", SERVICES: str(port)}
            stack.enter_context(pool.environment(given))
        server = f"{'host.internal' if way == 'open' else '127.0.0.1'}:{port}"
        if way == "pooled":
            stack.enter_context(pool.running(kernelspec))
        stack.callback(nursery.close)
        if way in ("restored", "open", "first") and _in_a_vm(manager):
            template.ensure(spec_of(kernelspec), Silent())
        if way in ("restored", "open") and _in_a_vm(manager):
            nursery.warm(spec_of(kernelspec))
        began = time.monotonic()
        manager.start_kernel(stderr=subprocess.DEVNULL)  # a plain kernel's warnings would break the table
        client = manager.blocking_client()
        turn = Turn(manager, client, folder, server, began)
        try:
            client.start_channels()
            client.kernel_info(reply=True, timeout=DEADLINE)
            turn.first_reply = time.monotonic() - began
            client.wait_for_ready(timeout=DEADLINE)
            turn.ready = time.monotonic() - began
            expect(turn.report, "restored" if way in ("first", "open") else way)
            if _in_a_vm(manager):
                _settle(spec_of(kernelspec))
            yield turn
        finally:
            client.stop_channels()
            if not turn.over:
                manager.shutdown_kernel(now=True)


@contextmanager
def _web_server(folder: Path) -> Iterator[int]:
    """A web server of `folder` on the host's loopback, in a process of its own; its port."""
    words = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
        "0",
    ]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline().split("port ")[1].split()[0])
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def traced(manager: KernelManager) -> dict[str, float]:
    """Seconds by phase of the start of a kernel's VM; nothing for a kernel without one."""
    handle = getattr(manager.provisioner, "handle", None)
    return dict(handle.status()["trace"]) if handle is not None else {}


def _in_a_vm(manager: KernelManager) -> bool:
    """Whether the kernelspec names this project's provisioner."""
    provisioner = manager.kernel_spec.metadata.get("kernel_provisioner", {})
    return bool(provisioner.get("provisioner_name") == "microvm-provisioner")


def _settle(spec: VMSpec) -> None:
    """Waits until the client has done what it does after a start, on the processor that is measured."""
    nursery.warm(spec if spec.start == "auto" else None)


def variant(name: str) -> tuple[str, str]:
    """The kernelspec of `name`, and how its VM is to start: as `WAYS` says, otherwise `restored`."""
    for ending in WAYS:
        if name.endswith(ending):
            return name.removesuffix(ending), WAYS[ending]
    return name, "restored"


def expect(report: Mapping[str, Any], way: str) -> None:
    """Sees to it that a VM started as it was to; a kernel without a VM has no report.

    Args:
        report: the provisioner's.
        way: `cold`, `restored` or `pooled`.

    Raises:
        KernelTrouble: it did not; with what the VM's log says of that.
    """
    told = report.get("start", way)
    if told == way:
        return
    try:
        log = Path(report.get("logs", ""), "supervisor.log").read_text()
    except OSError:
        log = ""
    said = [line.partition("WARNING ")[2] for line in log.splitlines() if " WARNING " in line]
    raise KernelTrouble(f"The kernel was {told} instead of {way} ({said[-1] if said else _FIXES[way]}).")
