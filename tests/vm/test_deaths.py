"""Why a kernel is dead: the running cell, the client and the next kernel's first cell all hear the same."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.microvm import KERNEL, READY, Kernel, microvm, until

LONG = "import time\nprint('running', flush=True)\ntime.sleep(600)"


def hear_death(kernel: Kernel, cell: str) -> dict[str, Any]:
    """The `error` of the running cell; its reply must tell the same."""
    messages = kernel.iopub_until_idle(cell)
    found = [m for m in messages if m["msg_type"] == "error"]
    assert len(found) == 1, messages
    error: dict[str, Any] = found[0]
    return error


def running(kernel: Kernel) -> str:
    """A cell that runs."""
    cell: str = kernel.client.execute(LONG)
    while kernel.client.get_iopub_msg(timeout=READY)["msg_type"] != "stream":
        pass
    return cell


CRASHES = {
    "SIGSEGV": "import ctypes; ctypes.string_at(0)",
    "SIGABRT": "import os; os.abort()",
    "SIGILL": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_told_with_its_signal(installed: None, name: str) -> None:
    with microvm() as kernel:
        cell = kernel.client.execute(CRASHES[name])
        error = hear_death(kernel, cell)
        assert error["content"]["ename"] == "KernelCrashed"
        assert (
            error["content"]["evalue"] == f"The kernel's process was killed by {name}; restart it to go on."
        )
        reply = kernel.reply_to(cell)
        assert reply["content"]["ename"] == "KernelCrashed"
        assert reply["metadata"]["sandbox_kernel"]["cell_seconds"] >= 0


def test_the_memory_limit_is_told_with_its_figures(installed: None) -> None:
    with microvm(memory=320) as kernel:
        cell = kernel.client.execute("hog = []\nwhile True: hog.append(b'x' * 4_000_000)")
        queued = kernel.client.execute("'never'")
        error = hear_death(kernel, cell)
        assert error["content"]["ename"] == "MemoryLimitExceeded"
        assert "the memory limit of 320 MiB was reached" in error["content"]["evalue"]
        record = error["metadata"]["sandbox_kernel"]
        assert (record["limit"], record["unit"]) == (320, "MiB")
        assert 100 < record["peak"] <= 320
        assert record["cell_seconds"] > 0
        assert record["uptime"] > 0
        assert kernel.reply_to(cell)["metadata"] == error["metadata"]
        assert kernel.reply_to(queued)["content"]["status"] == "aborted"
        assert until(lambda: not kernel.manager.is_alive(), READY)
        info = asyncio.run(kernel.manager.provisioner.get_provisioner_info())
        assert info["death"]["name"] == "MemoryLimitExceeded"
        assert info["death"]["peak"] == record["peak"]


def test_a_qemu_that_was_killed_is_told(installed: None) -> None:
    with microvm() as kernel:
        cell = running(kernel)
        kernel.qemu.send_signal(signal.SIGKILL)
        error = hear_death(kernel, cell)
        assert error["content"]["ename"] == "VMMDied"
        assert "QEMU was killed by signal 9" in error["content"]["evalue"]
        assert kernel.reply_to(cell)["content"]["ename"] == "VMMDied"


def test_a_host_that_shuts_down_is_told(installed: None) -> None:
    with microvm() as kernel:
        cell = running(kernel)
        kernel.supervisor.send_signal(signal.SIGTERM)
        assert hear_death(kernel, cell)["content"]["ename"] == "HostShuttingDown"
        assert kernel.reply_to(cell)["content"]["ename"] == "HostShuttingDown"


def test_a_shutdown_that_the_client_asked_for_is_no_death(installed: None) -> None:
    with microvm() as kernel:
        kernel.run("1")
        kernel.manager.shutdown_kernel(now=True)
        info = asyncio.run(kernel.manager.provisioner.get_provisioner_info())
        assert info["death"] is None


def test_nbclient_reports_the_sentence(installed: None) -> None:
    cells = [nbformat.v4.new_code_cell("import os; os.abort()"), nbformat.v4.new_code_cell("'never'")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, kernel_name="python3-microvm", timeout=READY)
    with pytest.raises(CellExecutionError) as caught:
        client.execute()
    assert "KernelCrashed" in str(caught.value)
    assert "The kernel's process was killed by SIGABRT; restart it to go on." in str(caught.value)


def test_the_first_cell_after_a_restart_begins_with_what_happened(installed: None) -> None:
    with microvm() as kernel:
        cell = kernel.client.execute("import os; os.abort()")
        hear_death(kernel, cell)
        assert until(lambda: not kernel.manager.is_alive(), READY)
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=READY)
        notice = (
            "[sandbox-kernel] The kernel was started anew, without its variables, after this: "
            "The kernel's process was killed by SIGABRT; restart it to go on."
        )
        assert kernel.run("print('hello')") == f"{notice}\nhello"
        assert kernel.run("print('hello')") == "hello"
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=READY)
        assert kernel.run("print('hello')") == "hello"


async def restarted(
    config: dict[str, Any], wreck: str, event: str, callback: Callable[[AsyncIOLoopKernelManager], Any]
) -> Any:
    """What `callback` finds when a restarter has noticed `event` ("restart", "dead") of a kernel."""
    made = AsyncIOLoopKernelManager(kernel_name=KERNEL)
    made.kernel_spec.metadata = made.kernel_spec.metadata | {
        "kernel_provisioner": {"provisioner_name": "microvm-provisioner", "config": config}
    }
    made.config.KernelRestarter.time_to_dead = 0.3
    noticed = asyncio.Event()
    await made.start_kernel()
    made.add_restart_callback(noticed.set, event)
    try:
        client = made.client()
        client.start_channels()
        await client.wait_for_ready(timeout=READY)
        client.execute(wreck)
        await asyncio.wait_for(noticed.wait(), READY)
        # All clients of one manager have one identity: who reconnects last gets the replies.
        client.stop_channels()
        return await callback(made)
    finally:
        await made.shutdown_kernel(now=True)


async def test_a_restarter_does_not_bring_an_idle_kernel_back_but_a_person_can(installed: None) -> None:
    async def look(made: AsyncIOLoopKernelManager) -> tuple[bool, bool]:
        dead = not await made.is_alive()
        await made.restart_kernel(now=True)
        return dead, await made.is_alive()

    assert await restarted({"idle_timeout": 2}, "1", "dead", look) == (True, True)


async def test_a_restarter_brings_a_crashed_kernel_back_with_a_notice(installed: None) -> None:
    async def look(made: AsyncIOLoopKernelManager) -> str:
        # "restart" is told before it is done.
        async with asyncio.timeout(READY):
            while not await made.is_alive():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        client = made.client()
        client.start_channels()
        await client.wait_for_ready(timeout=READY)
        text: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            text.append(message["content"].get("text", ""))

        await client._async_execute_interactive("print('hello')", output_hook=collect, timeout=READY)
        client.stop_channels()
        return "".join(text)

    said = await restarted({}, "import os; os.abort()", "restart", look)
    assert said.startswith(
        "[sandbox-kernel] The kernel was started anew, without its variables, after this: "
    )
    assert said.endswith("hello\n")
