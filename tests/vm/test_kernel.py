"""What a user does with a kernel, done with one in a micro-VM."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jupyter_client import BlockingKernelClient

from tests.microvm import READY, Kernel, microvm


@pytest.fixture(scope="module")
def kernel(installed: None) -> Iterator[Kernel]:
    with microvm() as started:
        yield started


def test_the_kernel_has_a_linux_of_its_own(kernel: Kernel) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id")
    theirs, ours = uuid.UUID(kernel.run(f"print(open('{boot}').read())")), uuid.UUID(boot.read_text().strip())
    assert theirs != ours
    assert kernel.run("open('/proc/1/cmdline').read().split(chr(0))[-2]").endswith("init.py'")


def test_the_kernel_is_an_ordinary_user_in_its_own_cgroup(kernel: Kernel) -> None:
    assert kernel.run("import os; (os.getuid(), os.getgid(), os.getgroups())") == "(1000, 1000, [1000])"
    assert kernel.run("open('/proc/self/cgroup').read()") == r"'0::/kernel\n'"


def test_the_hosts_variables_are_not_there(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    names = kernel.run("import os; print(*sorted(os.environ))").split()
    assert "PWD" not in names or "HOSTNAME" not in names
    assert not {
        "VIRTUAL_ENV",
        "MAKEFLAGS",
        "PYENV_ROOT",
        "SSH_AUTH_SOCK",
        "SANDBOX_KERNEL_CHANNEL_FDS",
    } & set(names)


def test_there_is_no_network(kernel: Kernel) -> None:
    assert kernel.run("print(*__import__('os').listdir('/sys/class/net'))") == "lo"
    with pytest.raises(RuntimeError, match="OSError"):
        kernel.run("import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)")


def test_the_image_is_not_written_to_but_looks_writable(kernel: Kernel) -> None:
    kernel.run("open('note.txt', 'w').write('x' * 1000)")
    assert kernel.run("import os; os.path.getsize(os.path.expanduser('~/note.txt'))") == "1000"


@pytest.mark.parametrize("module", ["numpy", "pandas", "matplotlib", "ipywidgets", "psutil", "debugpy"])
def test_the_default_image_has(kernel: Kernel, module: str) -> None:
    assert kernel.run(f"import {module}; print({module}.__name__)") == module


def test_input_is_asked_of_the_client_that_runs_the_cell(kernel: Kernel) -> None:
    other = BlockingKernelClient(connection_file=kernel.manager.connection_file)
    other.load_connection_file()  # unlike manager.client(), this is a client with a session of its own
    other.start_channels()
    other.wait_for_ready(timeout=READY)
    asked = kernel.client.execute("print('hello', input('name? '))", allow_stdin=True)
    request = kernel.client.get_stdin_msg(timeout=READY)
    assert request["content"]["prompt"] == "name? "
    kernel.client.input("Ada")
    printed = [m["content"]["text"] for m in kernel.iopub_until_idle(asked) if m["msg_type"] == "stream"]
    assert "".join(printed).endswith("hello Ada\n")
    kernel.reply_to(asked)
    other.stop_channels()


def test_an_interrupt_stops_a_cell_that_floods_its_output(kernel: Kernel) -> None:
    asked = kernel.client.execute("while True: print('x' * 1000)")
    while kernel.client.get_iopub_msg(timeout=READY)["msg_type"] != "stream":
        pass
    kernel.manager.interrupt_kernel()
    messages = kernel.iopub_until_idle(asked)
    assert [m["content"]["ename"] for m in messages if m["msg_type"] == "error"] == ["KeyboardInterrupt"]
    kernel.reply_to(asked)
    assert kernel.run("1 + 1") == "2"


def test_a_liveness_probe_is_not_a_signal(kernel: Kernel) -> None:
    kernel.manager.signal_kernel(0)
    assert kernel.run("'alive'") == "'alive'"


def test_any_signal_reaches_the_kernels_process_group(kernel: Kernel) -> None:
    kernel.run("import signal; got = []; signal.signal(signal.SIGUSR1, lambda *_: got.append(1))")
    kernel.manager.signal_kernel(signal.SIGUSR1)
    assert kernel.run("import time\nwhile not got: time.sleep(0.01)\nlen(got)") == "1"


def test_large_output_arrives_whole(kernel: Kernel) -> None:
    assert len(kernel.run("print('y' * 3_000_000)")) == 3_000_000


def test_a_restart_on_the_same_endpoints_forgets_everything(kernel: Kernel) -> None:
    kernel.run("x = 41")
    before = kernel.client.get_connection_info()
    kernel.manager.restart_kernel()
    kernel.client.wait_for_ready(timeout=READY)
    assert kernel.client.get_connection_info() == before
    with pytest.raises(RuntimeError, match="NameError"):
        kernel.run("x")


def test_a_kernel_killed_for_memory_says_so(installed: None) -> None:
    with microvm(memory=320) as small:
        asked = small.client.execute("hog = []\nwhile True: hog.append(b'x' * 4_000_000)")
        messages = small.iopub_until_idle(asked)
        errors = [m["content"]["evalue"] for m in messages if m["msg_type"] == "error"]
        assert errors, messages
        assert "the memory limit of 320 MiB was reached" in errors[0]
        reply = small.reply_to(asked)
        assert (reply["content"]["status"], reply["content"]["evalue"]) == ("error", errors[0])


def test_a_kernel_that_ends_is_reported_dead_with_its_status(installed: None) -> None:
    with microvm() as kernel:
        asked = kernel.client.execute("import os; os._exit(3)")
        errors = [m["content"]["evalue"] for m in kernel.iopub_until_idle(asked) if m["msg_type"] == "error"]
        assert "3" in errors[0]
        deadline = time.monotonic() + READY
        while kernel.manager.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not kernel.manager.is_alive()


def test_a_second_start_on_one_manager_ends_the_first_vm(installed: None) -> None:
    with microvm() as kernel:
        first = kernel.supervisor
        kernel.manager.start_kernel()
        kernel.client.wait_for_ready(timeout=READY)
        assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
        assert kernel.run("2 + 2") == "4"


def test_tcp_and_curve_on_demand(installed: None) -> None:
    from tests.microvm import manager

    made = manager(transport="tcp")
    made.transport_encryption = "required"
    made.start_kernel()
    try:
        info = made.get_connection_info()
        assert info["transport"] == "tcp"
        assert info["curve_publickey"]
        assert Kernel(made).run("6 * 7") == "42"
    finally:
        made.shutdown_kernel(now=True)
