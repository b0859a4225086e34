"""Kernels in micro-VMs for tests: `with microvm(memory=512) as kernel: kernel.run("1+1")`."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from jupyter_client import BlockingKernelClient, KernelManager

from sandbox_kernel.jail.cgroup import PREFIX

KERNEL = "python3-microvm"
READY = 90.0
"""Seconds for a kernel under software emulation on a busy machine; a deadline, not a measurement."""


class Kernel:
    """A manager, a client, and short words for what tests do with them."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.client: BlockingKernelClient = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=READY)

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.pid)

    @property
    def qemu(self) -> psutil.Process:
        [found] = [p for p in self.supervisor.children(recursive=True) if p.name().startswith("qemu")]
        return found

    def run(self, code: str, timeout: float = READY) -> str:
        """What a cell prints and shows; raises RuntimeError with its error."""
        text: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                text.append(content["text"])
            elif message["msg_type"] in ("execute_result", "display_data"):
                text.append(content["data"]["text/plain"])

        reply = self.client.execute_interactive(code, timeout=timeout, output_hook=collect, allow_stdin=False)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"{reply['content'].get('ename')}: {reply['content'].get('evalue')}")
        return "".join(text).rstrip("\n")

    def reply_to(self, message_id: str, timeout: float = READY) -> dict[str, Any]:
        """The reply on shell to one request; others are passed over."""
        while True:
            reply = self.client.get_shell_msg(timeout=timeout)
            if reply["parent_header"]["msg_id"] == message_id:
                return reply

    def iopub_until_idle(self, message_id: str, timeout: float = READY) -> list[dict[str, Any]]:
        """Messages on iopub for one request, up to and with its `idle`."""
        messages = []
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=1)
                if message["parent_header"].get("msg_id") == message_id:
                    messages.append(message)
                    if message["content"].get("execution_state") == "idle":
                        return messages
        raise TimeoutError(f"no idle for {message_id}; got {[m['msg_type'] for m in messages]}")


def manager(**config: Any) -> KernelManager:
    """A manager for the micro-VM kernel whose kernelspec has `config`; not started."""
    made = KernelManager(kernel_name=KERNEL)
    made.kernel_spec.metadata = made.kernel_spec.metadata | {
        "kernel_provisioner": {"provisioner_name": "microvm-provisioner", "config": config}
    }
    return made


@contextlib.contextmanager
def microvm(**config: Any) -> Iterator[Kernel]:
    """A started kernel, shut down at the end."""
    made = manager(**config)
    made.start_kernel()
    kernel = None
    try:
        kernel = Kernel(made)
        yield kernel
    finally:
        if kernel is not None:
            kernel.client.stop_channels()
        made.shutdown_kernel(now=True)


def traces(vm: str) -> list[str]:
    """Whatever exists on this host because of the VM with id `vm`: processes, folders, cgroups."""
    from sandbox_kernel.paths import runtime_dir

    found = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{PREFIX}{vm}")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"{PREFIX}{vm}")]
    found += [str(path) for path in runtime_dir().glob(vm)]
    for process in psutil.process_iter(["pid", "cmdline", "name"]):
        if any(vm in word for word in process.info["cmdline"] or ()):
            found.append(f"process {process.info['pid']} {process.info['name']}")
    return found


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one that only waits for an init to collect it has."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition: Any, seconds: float) -> bool:
    """Whether `condition()` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
