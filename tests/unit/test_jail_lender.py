"""Lending a file for reading to a child that opens it for writing; Linux' side of it included."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import pytest

from sandbox_kernel.errors import TemplateUnsafeError
from sandbox_kernel.jail import lender as module
from sandbox_kernel.jail.bubblewrap import Jail
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.jail.lender import Lender
from sandbox_kernel.machine.spawn import spawn

LIBC = """
import ctypes, errno, fcntl, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def result(value):
    return value if value >= 0 else errno.errorcode[ctypes.get_errno()]
def open_(path, flags=os.O_RDWR):  # os.open would add O_CLOEXEC
    return result(libc.open(path.encode(), flags))
def old_open(path, flags=os.O_RDWR):
    return result(libc.syscall(2, path.encode(), flags))
def openat(path, flags=os.O_RDWR):
    return result(libc.syscall(257, os.open("/", os.O_RDONLY), path.encode(), flags))
def access(fd):
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "ram"
    made.write_text("as saved")
    return made


def child(lender: Lender, code: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-ISc", LIBC + code]
    return lender.run(lambda: subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))


async def output(lender: Lender, code: str) -> str:
    """What a child prints whose calls are answered."""
    popen = child(lender, code)
    lender.serve(asyncio.get_running_loop())
    try:
        async with asyncio.timeout(10):
            return (await asyncio.to_thread(popen.communicate))[0].strip()
    finally:
        popen.kill()
        popen.wait()
        lender.close()


@pytest.mark.parametrize("call", ["open_", "old_open"])
async def test_the_file_is_lent_for_reading(file: Path, call: str) -> None:
    lender = Lender(PurePosixPath(file))
    code = f"fd = {call}({str(file)!r}); print(access(fd) == os.O_RDONLY, os.read(fd, 99).decode())"
    assert await output(lender, code) == "True as saved"
    assert lender.lent
    assert not lender.refusal


def test_what_is_lent_can_be_mapped_privately_and_not_written(file: Path) -> None:
    code = f"""
import mmap
fd = open_({str(file)!r})
memory = mmap.mmap(fd, 8, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
memory[:2] = b"no"
for attempt in (
    lambda: os.write(fd, b"x"),
    lambda: os.ftruncate(fd, 0),
    lambda: mmap.mmap(fd, 8, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
):
    try: print(attempt())
    except OSError as error: print("refused")
"""
    assert asyncio.run(output(Lender(PurePosixPath(file)), code)) == "refused\n" * 2 + "refused"
    assert file.read_text() == "as saved"


async def test_it_is_lent_once_and_then_nobody_listens_any_more(file: Path) -> None:
    code = f"open_({str(file)!r}); print(open_({str(file)!r}), open_({str(file)!r}, os.O_RDONLY) > 0)"
    lender = Lender(PurePosixPath(file))
    assert await output(lender, code) == "ENOSYS True"


async def test_other_calls_go_on(file: Path) -> None:
    code = f"""
print(open_("/dev/null") > 0, open_("/no/such/file"), open_({str(file) + "2"!r}), open_("{"x" * 5000}"))
print(result(libc.open(None, os.O_RDWR)), result(libc.open(ctypes.c_void_p(-1), os.O_RDWR)))
"""
    lender = Lender(PurePosixPath(file))
    assert await output(lender, code) == "True ENOENT ENOENT ENAMETOOLONG\nEFAULT EFAULT"
    assert not lender.lent


async def test_a_signal_between_question_and_answer_costs_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, interrupted = module.Listener.answer, []

    def late(listener: module.Listener, request: module.Request, fd: int) -> None:
        if not interrupted:
            interrupted.append(request.thread)
            os.kill(request.thread, signal.SIGUSR1)
            time.sleep(0.2)  # until it has been handled, and the call has begun anew
        answer(listener, request, fd)

    monkeypatch.setattr(module.Listener, "answer", late)
    code = f"""
import signal
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, False)
print(access(open_({str(file)!r})) == os.O_RDONLY)
"""
    lender = Lender(PurePosixPath(file))
    assert await output(lender, code) == "True"
    assert interrupted
    assert lender.lent


async def test_a_link_is_not_followed(file: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(file)
    lender = Lender(PurePosixPath(link))
    assert await output(lender, f"print(access(open_({str(link)!r})) == os.O_RDWR)") == "True"
    assert not lender.lent
    assert "symbolic links" in lender.refusal


def test_calls_of_other_kinds_are_not_even_asked_about(file: Path) -> None:
    lender = Lender(PurePosixPath(file))
    code = f"""
path = {str(file)!r}
asked = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CLOEXEC, os.O_RDWR | os.O_CREAT)
print(*(open_(path, flags) > 0 for flags in asked), openat(path) > 0)
"""
    popen = child(lender, code)  # nobody serves
    assert popen.communicate(timeout=10)[0] == "True True True True True\n"
    lender.close()


def test_a_call_that_waits_fails_when_nobody_listens_any_more(file: Path) -> None:
    lender = Lender(PurePosixPath(file))
    popen = child(lender, f"print('asks', flush=True); print(open_({str(file)!r}))")
    assert popen.stdout is not None
    assert popen.stdout.readline() == "asks\n"
    lender.close()
    assert popen.communicate(timeout=10)[0] == "ENOSYS\n"


def test_a_call_that_waits_dies_with_the_process_that_listened(file: Path) -> None:
    code = f"""
import os, subprocess, sys
from pathlib import PurePosixPath
from sandbox_kernel.jail.lender import Lender
lender = Lender(PurePosixPath({str(file)!r}))
code = {LIBC!r} + "print('asks', flush=True); print(open_({str(file)!r}), flush=True)"
lender.run(lambda: subprocess.Popen([sys.executable, "-ISc", code]))
sys.stdin.read()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "asks\n"
    owner.kill()
    assert owner.communicate(timeout=10)[0] == "ENOSYS\n"


async def test_a_child_that_is_killed_while_it_asks_disturbs_nobody(file: Path) -> None:
    lender = Lender(PurePosixPath(file))
    popen = child(lender, f"print('asks', flush=True); open_({str(file)!r})")
    assert popen.stdout is not None
    assert popen.stdout.readline() == "asks\n"
    popen.kill()
    popen.communicate()
    lender.serve(asyncio.get_running_loop())
    await asyncio.sleep(0.1)
    assert not lender.lent
    lender.close()
    lender.close()


def test_a_second_listener_is_refused_and_that_is_told(file: Path) -> None:
    code = f"""
from pathlib import PurePosixPath
from sandbox_kernel.jail.lender import Lender
from sandbox_kernel.jail.seccomp import Filter
kept = Filter().install()
lender = Lender(PurePosixPath({str(file)!r}))
try: lender.run(lambda: print("not to be run"))
except OSError as error: print(error.errno, lender.refusal)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=10
    )
    assert done.stdout == f"{errno.EBUSY} seccomp: {os.strerror(errno.EBUSY)}\n"


def test_the_thread_stays_for_as_long_as_the_child_may_live_and_then_goes(file: Path) -> None:
    lender = Lender(PurePosixPath(file))
    before = threading.active_count()
    death = "libc.prctl(1, 9); print('set', flush=True); sys.stdin.read()"  # PR_SET_PDEATHSIG, SIGKILL
    argv = [sys.executable, "-ISc", LIBC + death]
    popen = lender.run(lambda: subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert popen.stdout is not None
    assert popen.stdout.readline() == b"set\n"
    with pytest.raises(subprocess.TimeoutExpired):
        popen.wait(0.2)
    assert threading.active_count() == before + 1
    lender.close()
    assert popen.wait(10) == -9
    popen.communicate()
    assert threading.active_count() == before


def test_what_fails_in_the_thread_fails_here(file: Path) -> None:
    lender = Lender(PurePosixPath(file))
    with pytest.raises(FileNotFoundError):
        lender.run(lambda: subprocess.Popen(["/no/such/program"]))
    assert not lender.refusal


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_host_that_refuses_runs_no_jail(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(module.Filter, "install", refuse)
    before = descriptors()
    jail = Jail(Path("/bin/true"), Path("/bin/true"), file.parent)
    with pytest.raises(TemplateUnsafeError, match=r"\(seccomp: Operation not permitted\); install QEMU 8\.2"):
        spawn(jail, ["x"], (), Cgroup(()), lender=Lender(PurePosixPath(file)))
    assert descriptors() == before


def test_a_bubblewrap_that_is_set_uid_root_cannot_be_used(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.touch()
    bwrap.chmod(0o4755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(TemplateUnsafeError, match="is set-uid root"):
        spawn(
            Jail(bwrap, Path("/bin/true"), tmp_path),
            ["x"],
            (),
            Cgroup(()),
            lender=Lender(PurePosixPath(file)),
        )
