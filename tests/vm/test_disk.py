"""Where a kernel's files go: memory by default, a scratch disk on request; how much, and how fast."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sandbox_kernel import paths
from tests.microvm import Kernel, microvm

FILL = (
    "import errno, os\n"
    "def fill(path):\n"
    "    try:\n"
    "        with open(path, 'wb', buffering=0) as file:\n"
    "            while True: file.write(bytes(1 << 20))\n"
    "    except OSError as error:\n"
    "        return errno.errorcode[error.errno]\n"
    "    finally:\n"
    "        size = os.path.getsize(path) >> 20\n"
    "        print(size)\n"
    "        os.unlink(path)\n"
)


def free(kernel: Kernel, path: str) -> int:
    """MiB that are free in the guest."""
    return int(kernel.run(f"import os; s = os.statvfs('{path}'); print(s.f_bavail * s.f_frsize >> 20)"))


@pytest.mark.parametrize("start", ["auto", "cold"])
def test_a_scratch_disk_takes_what_the_kernel_writes(installed: None, start: str) -> None:
    with microvm(memory=320, disk=600, start=start) as kernel:
        for folder in ("/home/sandbox", "/tmp", "/var/tmp"):
            assert 500 < free(kernel, folder) <= 600
        # More than there is memory, relative to where the kernel is.
        kernel.run("with open('large', 'wb') as f:\n    for _ in range(400): f.write(bytes(1 << 20))")
        assert kernel.run("import os; os.path.getsize(os.path.expanduser('~/large')) >> 20") == "400"
        kernel.run(FILL)
        left = free(kernel, "/tmp")
        size, error = kernel.run("fill('/tmp/file')").split()
        assert error == "'ENOSPC'"
        assert abs(int(size) - left) <= 5
        assert kernel.run("'alive'") == "'alive'"
        kernel.run("import tempfile; tempfile.TemporaryFile().close()")


def test_a_scratch_disk_has_no_name_on_the_host_and_is_gone_with_its_vm(installed: None) -> None:
    folder = paths.cache_dir()
    before = set(folder.iterdir())
    with microvm(disk=100) as kernel:
        kernel.run("open('x', 'wb').write(bytes(50 << 20)); import os; os.sync()")
        assert set(folder.iterdir()) == before
        held = [str(fd.readlink()) for fd in Path(f"/proc/{kernel.qemu.pid}/fd").iterdir()]
        assert [name for name in held if name.startswith(str(folder)) and name.endswith("(deleted)")]


def test_files_in_memory_end_at_half_of_it_with_an_error_that_says_so(installed: None) -> None:
    with microvm(memory=512) as kernel:
        kernel.run(FILL)
        size, error = kernel.run("fill('/tmp/file')").split()
        assert error == "'ENOSPC'"
        assert 200 < int(size) <= 256
        # Home and /tmp have that half together.
        kernel.run("open('half', 'wb').write(bytes(100 << 20))")
        assert int(kernel.run("fill('/tmp/file')").split()[0]) < 160
        assert kernel.run("'alive'") == "'alive'"


def test_inodes_end_before_the_memory_does(installed: None) -> None:
    with microvm(memory=512) as kernel:
        code = (
            "import errno, os\nos.mkdir('/tmp/many')\ncount = 0\n"
            "try:\n    while True:\n        os.close(os.open(f'/tmp/many/{count}', os.O_CREAT)); count += 1\n"
            "except OSError as error: print(errno.errorcode[error.errno])"
        )
        assert kernel.run(code) == "ENOSPC"
        assert int(kernel.run("print(count)")) > 10_000
        assert kernel.run("'alive'") == "'alive'"


def test_a_disk_is_as_fast_as_it_may_be_and_no_faster(installed: None) -> None:
    def seconds(kernel: Kernel) -> float:
        kernel.run("import os\nf = os.open('x', os.O_CREAT | os.O_WRONLY)")
        began = time.monotonic()
        kernel.run("for _ in range(12): os.write(f, bytes(1 << 20))\nos.fsync(f)")
        return time.monotonic() - began

    with microvm(disk=200) as free_of_limits, microvm(disk=200, disk_bandwidth=4) as limited:
        # QEMU lets a tenth of a second's worth pass at once.
        assert seconds(limited) > 2.5
        assert seconds(free_of_limits) < 2.5


def test_reads_and_writes_are_counted_too(installed: None) -> None:
    with microvm(disk=200, disk_iops=50) as kernel:
        kernel.run("import os\nf = os.open('x', os.O_CREAT | os.O_WRONLY | os.O_SYNC)")
        began = time.monotonic()
        kernel.run("for i in range(150): os.pwrite(f, b'x' * 4096, i * 65536)")
        assert time.monotonic() - began > 2
