"""What holds when the code in the guest is hostile, and what QEMU itself could reach if it were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.microvm import Kernel, microvm


@pytest.fixture(scope="module")
def kernel(installed: None) -> Iterator[Kernel]:
    with microvm(processes=64) as started:
        yield started


def qemu(kernel: Kernel) -> psutil.Process:
    [process] = [p for p in kernel.supervisor.children(recursive=True) if p.name().startswith("qemu")]
    return process


def test_qemu_is_alone_in_its_namespaces(kernel: Kernel) -> None:
    for kind in ("user", "mnt", "pid", "ipc", "net", "uts"):
        assert (
            Path(f"/proc/{qemu(kernel).pid}/ns/{kind}").readlink() != Path("/proc/self/ns", kind).readlink()
        )


def test_qemu_has_no_capability_and_can_get_none_and_is_filtered(kernel: Kernel) -> None:
    lines = Path(f"/proc/{qemu(kernel).pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


@pytest.fixture(scope="module")
def cold(installed: None) -> Iterator[Kernel]:
    with microvm(start="cold") as started:
        yield started


@pytest.mark.parametrize("start", ["kernel", "cold"])
def test_qemu_sees_neither_homes_nor_a_shell_and_can_write_to_no_file_but_a_templates(
    start: str, request: pytest.FixtureRequest
) -> None:
    kernel: Kernel = request.getfixturevalue(start)
    root = Path(f"/proc/{qemu(kernel).pid}/root")
    # QEMU before 8.2 wants a template's RAM opened for writing; see SPECIFICATION.md, "Isolation".
    ram = {"ram"} if kernel.manager.provisioner.report["start"] == "restored" else set()
    assert {path.name for path in root.iterdir()} <= {
        *("dev", "proc", "usr", "lib", "lib64", "etc", "image"),
        *ram,
    }
    assert [path.name for path in (root / "etc").iterdir()] == ["ld.so.cache"]
    assert [path.name for path in (root / "usr" / "bin").iterdir()] == ["qemu-system-x86_64"]
    mounts = Path(f"/proc/{qemu(kernel).pid}/mounts").read_text().splitlines()
    for mount in mounts:
        _, target, kind, options, *_ = mount.split()
        if kind not in ("tmpfs", "proc", "devpts", "devtmpfs", "mqueue") and target.lstrip("/") not in ram:
            assert "ro" in options.split(","), mount


def test_qemu_holds_no_socket_but_its_three(kernel: Kernel) -> None:
    links = [str(path.readlink()) for path in Path(f"/proc/{qemu(kernel).pid}/fd").iterdir()]
    assert len({link for link in links if link.startswith("socket:")}) == 3  # QMP, console, vsock


def test_a_fork_bomb_stops_at_the_limit_and_an_interrupt_still_works(kernel: Kernel) -> None:
    bomb = (
        "import subprocess, time\n"
        "born = []\n"
        "try:\n"
        "    while True: born.append(subprocess.Popen(['sleep', '600'], start_new_session=True))\n"
        "except BlockingIOError as error: print('EAGAIN', error.errno == 11, flush=True)\n"
        "time.sleep(600)"
    )
    asked = kernel.client.execute(bomb)
    while kernel.client.get_iopub_msg(timeout=90)["msg_type"] != "stream":
        pass
    kernel.manager.interrupt_kernel()
    messages = kernel.iopub_until_idle(asked)
    assert [m["content"]["ename"] for m in messages if m["msg_type"] == "error"] == ["KeyboardInterrupt"]
    assert 0 < int(kernel.run("len(born)")) < 64


def test_user_code_cannot_touch_the_agent_or_the_guests_root(kernel: Kernel) -> None:
    for attack in (
        "os.kill(1, 9)",
        "open('/sys/fs/cgroup/kernel/pids.max', 'w').write('max')",
        "open('/proc/sysrq-trigger', 'w').write('b')",
        "open('/usr/lib/sandbox-kernel/init.py', 'a')",
        "os.setuid(0)",
    ):
        with pytest.raises(RuntimeError, match="PermissionError"):
            kernel.run(f"import os; {attack}")
    assert kernel.run("'still here'") == "'still here'"
