"""Volumes on real VMs: what is in them outlives kernels; one kernel writes to one, or several read it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sandbox_kernel.cli.main import main
from sandbox_kernel.errors import ConfigurationError, VolumeBusy, VolumeError
from sandbox_kernel.files.volumes import VolumeStore
from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import nursery
from tests.microvm import Kernel, manager, microvm, traces, until
from tests.vm import pools
from tests.vm.conftest import LIMIT

SIZE = 64
FILL = (
    "import errno, os\n"
    "try:\n"
    "    with open('/data/fill', 'wb', buffering=0) as file:\n"
    "        while True: file.write(bytes(1 << 20))\n"
    "except OSError as error: print(errno.errorcode[error.errno], os.path.getsize('/data/fill') >> 20)\n"
    "finally: os.unlink('/data/fill')"
)


@pytest.fixture
def name(installed: None) -> Iterator[str]:
    """An empty volume."""
    chosen = f"test-{os.getpid()}-{time.time_ns():x}"
    VolumeStore().create(chosen, SIZE)
    yield chosen
    nursery.close()
    VolumeStore().remove(chosen)


def refusal(kind: type[Exception], **config: Any) -> str:
    """What a start with that configuration is refused with; nothing may be left of it."""
    made = manager(**config)
    with pytest.raises(kind) as caught:
        made.start_kernel()
    assert not traces(made.provisioner._vm_id())
    made.cleanup_resources()
    return str(caught.value)


def is_free(name: str) -> bool:
    """Whether nobody has the volume."""
    with contextlib.suppress(VolumeBusy):
        os.close(VolumeStore().hold(name, True))
        return True
    return False


def access_of_qemu(kernel: Kernel, name: str) -> set[int]:
    """With what access (open(2)) QEMU has the volume's file open."""
    found = set()
    path = str(VolumeStore().directory / name)
    for link in Path(f"/proc/{kernel.qemu.pid}/fd").iterdir():
        if str(link.readlink()) == path:
            text = Path(f"/proc/{kernel.qemu.pid}/fdinfo/{link.name}").read_text()
            found.add(int(text.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    return found


def test_what_one_kernel_writes_several_later_ones_read_and_cannot_change(name: str) -> None:
    template.ensure(VMSpec(), Silent())
    with microvm(volumes=[f"{name}:/data:rw"], start="cold") as writer:
        assert writer.run("import os; print(os.stat('/data').st_uid == os.getuid())") == "True"
        line = writer.run("print([line for line in open('/proc/mounts') if ' /data ' in line][0])")
        assert {"rw", "nosuid", "nodev", "noatime"} <= set(line.split()[3].split(","))
        error, size = writer.run(FILL).split()
        assert error == "ENOSPC"
        assert SIZE * 0.8 < int(size) < SIZE
        # Not synced: the end of a kernel, even at once, is no crash.
        writer.run("with open('/data/kept', 'w') as file: file.write('from before')")
        pid = writer.supervisor.pid
        held = f"The volume {name} is attached read-write to the kernel of supervisor {pid}, which"
        assert refusal(VolumeBusy, volumes=[f"{name}:/data:rw"]) == (
            f"{held} `sandbox-kernel ps` shows; shut that kernel down, or have all of them attach it "
            "read-only."
        )
        assert refusal(VolumeBusy, volumes=[f"{name}:/data"]) == (
            f"{held} `sandbox-kernel ps` shows; shut that kernel down, or have it attach the volume "
            "read-only, too."
        )
        removal = CliRunner().invoke(main, ["volume", "rm", name])
        assert (removal.exit_code, removal.stderr) == (
            1,
            f"sandbox-kernel: {held} `sandbox-kernel ps` shows; shut that kernel down to remove it.\n",
        )
        listed = CliRunner().invoke(main, ["volume", "ls"]).stdout
        [row] = [line.split() for line in listed.splitlines() if line.startswith(name)]
        assert row[1:3] == ["64", "MiB"]
        assert row[5:] == [writer.manager.provisioner._vm_id(), "(rw)"]
    config = {"volumes": [f"{name}:/data"], "disk": 64, "disk_bandwidth": 50}
    with microvm(**config) as one, microvm(**config) as other:
        for reader in (one, other):
            assert reader.manager.provisioner.report["start"] == "restored"
            assert reader.run("print(open('/data/kept').read())") == "from before"
            for change in ("open('/data/kept', 'w')", "os.unlink('/data/kept')", "os.mkdir('/data/new')"):
                with pytest.raises(RuntimeError) as caught:
                    reader.run(f"import os; {change}")
                assert "OSError: [Errno 30] Read-only file system" in str(caught.value)
            assert access_of_qemu(reader, name) == {os.O_RDONLY}
        text = refusal(VolumeBusy, volumes=[f"{name}:/data:rw"])
        assert text.startswith(f"The volume {name} is attached read-only to the kernel of supervisor ")


def test_a_killed_supervisor_frees_its_volumes_and_the_journal_is_replayed(name: str) -> None:
    template.ensure(VMSpec(), Silent())
    with microvm(volumes=[f"{name}:/data:rw"]) as kernel:
        kernel.run(
            "import os\nwith open('/data/synced', 'w') as file:\n"
            "    file.write('is there')\n    file.flush()\n    os.fsync(file.fileno())"
        )
        assert access_of_qemu(kernel, name) == {os.O_RDWR}
        assert not is_free(name)
        os.kill(kernel.supervisor.pid, signal.SIGKILL)
        assert until(lambda: is_free(name), LIMIT)
    assert refusal(VolumeError, volumes=[f"{name}:/data"]) == (
        "The volume on /data was not closed when its last kernel ended, so its journal has to be replayed "
        "before it can be read; attach it read-write once, with `:rw`."
    )
    with microvm(volumes=[f"{name}:/data:rw"], start="cold") as kernel:
        assert kernel.run("print(open('/data/synced').read())") == "is there"
        # A restart is an end and a start: the volume is there again.
        kernel.run("open('/data/restarted', 'w').write('too')")
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=90)
        assert kernel.run("print(open('/data/restarted').read())") == "too"
    with microvm(volumes=[f"{name}:/data"]) as kernel:
        assert kernel.run("import os; print(sorted(os.listdir('/data')))") == (
            "['lost+found', 'restarted', 'synced']"
        )


def test_a_vm_that_waits_for_a_kernel_has_no_volume(name: str) -> None:
    template.ensure(VMSpec(), Silent())
    nursery.close()
    with microvm(volumes=[f"{name}:/data:rw"]) as kernel:
        kernel.run("open('/data/x', 'w').write('1')")
        assert until(lambda: nursery._waiting is not None, 60)
    assert until(lambda: is_free(name), LIMIT)
    assert nursery._waiting is not None
    waits = nursery._waiting.handle.pid
    with microvm(volumes=[f"{name}:/data:rw"]) as kernel:
        assert kernel.supervisor.pid == waits
        assert kernel.run("print(open('/data/x').read())") == "1"


def test_a_kernel_from_a_pool_gets_its_volumes(name: str, runtime: Path) -> None:
    with pools.pool() as pool:
        pool.wait()
        with microvm(volumes=[f"{name}:/data:rw"]) as kernel:
            assert pools.started(kernel) == "pooled"
            kernel.run("open('/data/x', 'w').write('1')")
            text = refusal(VolumeBusy, volumes=[f"{name}:/data"])
            assert f" supervisor {kernel.supervisor.pid}, " in text


def test_a_volume_may_lie_in_the_home_on_a_scratch_disk_and_a_mount_in_the_volume(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("the host's")
    where = "/home/sandbox/keep"
    with microvm(
        volumes=[f"{name}:{where}:rw"], mounts=[f"{tmp_path}:{where}/host"], disk=64, workdir=where
    ) as kernel:
        seen = kernel.run("import os; print(os.getcwd(), open('host/file').read(), os.path.ismount('.'))")
        assert seen == f"{where} the host's True"
        kernel.run("open('mine', 'w').close()")


def test_what_cannot_be_attached_is_refused_with_the_way_out(name: str) -> None:
    text = refusal(ConfigurationError, volumes=["nosuch:/data"])
    assert text.startswith("There is no volume nosuch (there are: ")
    assert text.endswith("); make it with `sandbox-kernel volume create nosuch --size MIB`.")
    assert refusal(ConfigurationError, volumes=[f"{name}:/etc"]) == (
        f"The volume {name} cannot be mounted on /etc, which the guest's system needs; choose another path, "
        "such as /data."
    )
    with (VolumeStore().directory / name).open("r+b") as file:
        file.write(bytes(4096))
    for access in ("ro", "rw"):
        assert refusal(VolumeError, volumes=[f"{name}:/data:{access}"]) == (
            "The guest could not mount the volume on /data: Invalid argument; if it is damaged, take a copy "
            "or a new one."
        )
    assert is_free(name)
