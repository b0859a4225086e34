"""What holds when the code in the guest is hostile, and what QEMU itself could reach if it were."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from sandbox_kernel.host import template as host
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.jail.lender import Lender
from sandbox_kernel.qemu.command import READ_ONLY_RAM
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.store import Template, TemplateStore
from tests.microvm import READY, Kernel, microvm


@pytest.fixture(scope="module")
def kernel(installed: None) -> Iterator[Kernel]:
    with microvm(processes=64) as started:
        yield started


def restored(kernel: Kernel) -> bool:
    return bool(kernel.manager.provisioner.report["start"] == "restored")


def test_qemu_is_alone_in_its_namespaces(kernel: Kernel) -> None:
    for kind in ("user", "mnt", "pid", "ipc", "net", "uts"):
        assert Path(f"/proc/{kernel.qemu.pid}/ns/{kind}").readlink() != Path("/proc/self/ns", kind).readlink()


def test_qemu_has_no_capability_and_can_get_none_and_is_filtered(kernel: Kernel) -> None:
    lines = Path(f"/proc/{kernel.qemu.pid}/status").read_text().splitlines()
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
def test_qemu_sees_neither_homes_nor_a_shell_and_can_write_to_no_file(
    start: str, request: pytest.FixtureRequest
) -> None:
    kernel: Kernel = request.getfixturevalue(start)
    root = Path(f"/proc/{kernel.qemu.pid}/root")
    ram = {"ram"} if restored(kernel) else set()
    assert {path.name for path in root.iterdir()} <= {
        *("dev", "proc", "usr", "lib", "lib64", "etc", "image"),
        *ram,
    }
    assert [path.name for path in (root / "etc").iterdir()] == ["ld.so.cache"]
    assert [path.name for path in (root / "usr" / "bin").iterdir()] == ["qemu-system-x86_64"]
    mounts = Path(f"/proc/{kernel.qemu.pid}/mounts").read_text().splitlines()
    for mount in mounts:
        _, _, kind, options, *_ = mount.split()
        if kind not in ("tmpfs", "proc", "devpts", "devtmpfs", "mqueue"):
            assert "ro" in options.split(","), mount
    assert ram <= {mount.split()[1].lstrip("/") for mount in mounts}


@pytest.fixture(scope="module")
def clone(installed: None) -> Iterator[tuple[Kernel, Template]]:
    template = host.ensure(VMSpec(), Silent())
    with microvm() as started:
        assert restored(started)
        yield started, template


def test_a_restored_qemu_cannot_open_its_templates_ram_for_writing(clone: tuple[Kernel, Template]) -> None:
    kernel, _ = clone
    ram = Path(f"/proc/{kernel.qemu.pid}/root/ram")
    os.close(os.open(ram, os.O_RDONLY))
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(OSError) as caught:
            os.open(ram, flags)
        assert caught.value.errno == errno.EROFS


def test_no_descriptor_and_no_mapping_of_a_restored_qemu_writes_to_its_template(
    clone: tuple[Kernel, Template],
) -> None:
    kernel, template = clone
    proc = Path(f"/proc/{kernel.qemu.pid}")
    file = template.ram.stat()
    modes = []
    for link in (proc / "fd").iterdir():
        if (found := link.stat()).st_ino == file.st_ino and found.st_dev == file.st_dev:
            info = dict(line.split(":\t") for line in (proc / "fdinfo" / link.name).read_text().splitlines())
            modes.append(int(info["flags"], 8) & os.O_ACCMODE)
    assert modes == [os.O_RDONLY]
    for link in (proc / "fd").iterdir():
        # What QEMU could make of a descriptor: open it anew, on the mount that it was opened on.
        if stat.S_ISREG(link.stat().st_mode):
            with pytest.raises(OSError) as caught:
                os.open(link, os.O_RDWR)
            # A file of somebody else's is refused before anybody looks at the mount.
            theirs = link.stat().st_uid != os.getuid()
            assert caught.value.errno == (errno.EACCES if theirs else errno.EROFS), link.readlink()
    mappings = [line.split() for line in (proc / "maps").read_text().splitlines()]
    rights = {words[1] for words in mappings if words[4] == str(file.st_ino)}
    assert rights == {"rw-p"}


def test_nobody_is_asked_any_more_what_a_restored_qemu_opens(clone: tuple[Kernel, Template]) -> None:
    links = [str(path.readlink()) for path in Path(f"/proc/{clone[0].supervisor.pid}/fd").iterdir()]
    assert not [link for link in links if "seccomp" in link]


def test_a_clone_that_writes_to_all_of_its_memory_leaves_its_template_as_it_was(
    clone: tuple[Kernel, Template],
) -> None:
    kernel, template = clone

    def state() -> tuple[str, int]:
        with template.ram.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return digest, template.ram.stat().st_ctime_ns

    before = state()
    assert kernel.run("mine = b'mine' * (100 << 20); len(mine)") == str(400 << 20)
    assert state() == before
    with template.ram.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert memory.find(b"mine" * 1024) == -1


UNDER_A_FILTER = """
import json
from pathlib import Path
from tests.microvm import microvm
with microvm() as kernel:
    report = kernel.manager.provisioner.report
    log = Path(report["logs"], "supervisor.log").read_text()
    print(json.dumps([report["start"], kernel.run("6 * 7"), log]))
"""


def test_where_qemu_cannot_be_kept_from_writing_to_a_template_the_kernel_boots(
    clone: tuple[Kernel, Template],
) -> None:
    _, template = clone
    if template.qemu >= READ_ONLY_RAM:
        pytest.skip("this QEMU needs no help to open its RAM for reading")
    # Linux allows a process one listener; here the test has it.
    lender = Lender(PurePosixPath("/no/such/file"))
    argv = [sys.executable, "-c", UNDER_A_FILTER]
    popen = lender.run(lambda: subprocess.Popen(argv, stdout=subprocess.PIPE))

    async def end() -> bytes:
        lender.serve(asyncio.get_running_loop())
        return (await asyncio.to_thread(popen.communicate, timeout=READY))[0]

    try:
        start, answer, log = json.loads(asyncio.run(end()))
    finally:
        popen.kill()
        popen.wait()
        lender.close()
    assert (start, answer) == ("cold", "42")
    [line] = [line for line in log.splitlines() if "The kernel boots instead." in line]
    assert "install QEMU 8.2 or later" in line
    assert template.digest in [each.digest for each in TemplateStore().all()]


def test_qemu_holds_no_socket_but_those_it_is_for(kernel: Kernel) -> None:
    wanted = {"kernel": 2, "userspace": 3}[kernel.manager.provisioner.report["vsock"][0]]
    links = [str(path.readlink()) for path in Path(f"/proc/{kernel.qemu.pid}/fd").iterdir()]
    assert len({link for link in links if link.startswith("socket:")}) == wanted  # QMP, console, vsock


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
