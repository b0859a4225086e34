"""Directories of the host in a kernel: used as locally, bounded, and never more than was mounted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from sandbox_kernel.errors import ConfigurationError, MountError
from tests.microvm import READY, Kernel, alive, manager, microvm, until
from tests.vm.conftest import LIMIT

HERE = "python3-microvm-here"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the host with some data, and one beside it that nobody mounts."""
    place = tmp_path_factory.mktemp("mounts") / "book"
    place.mkdir()
    (place / "data.csv").write_text("a,b\n1,2\n3,4\n")
    (place.parent / "secret").write_text("the host's secret")
    return place


@pytest.fixture(scope="module")
def kernel(installed: None, folder: Path) -> Iterator[Kernel]:
    """A restored kernel that has the directory at the same path, starts there, and sees another one."""
    mounts = [f"{folder}:{folder}:rw", "/usr/share/doc:/doc"]
    with microvm(mounts=mounts, workdir=str(folder)) as running:
        yield running


def test_data_is_read_and_results_are_kept_as_with_a_local_kernel(kernel: Kernel, folder: Path) -> None:
    cell = """
        import pandas as pd
        frame = pd.read_csv("data.csv")
        frame.describe().to_csv("out.csv")
        import matplotlib; matplotlib.use("agg")
        frame.plot().figure.savefig("plot.png")
        print(int(frame.b.sum()))
        """
    assert kernel.run("\n".join(line.strip() for line in cell.splitlines())).endswith("6")
    assert (folder / "out.csv").read_text().startswith(",a,b\n")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_files_belong_to_the_user_on_both_sides(kernel: Kernel, folder: Path) -> None:
    seen = kernel.run(
        "import os; open('mine', 'w').close(); s = os.stat('mine'); print(s.st_uid == os.getuid())"
    )
    assert seen == "True"
    assert (folder / "mine").stat().st_uid == os.getuid()


def test_what_the_host_writes_is_seen_at_once(kernel: Kernel, folder: Path) -> None:
    for text in ("first", "second, and longer"):
        (folder / "changing").write_text(text)
        assert kernel.run("print(open('changing').read())") == text


def test_a_file_can_be_mapped_and_written_that_way(kernel: Kernel, folder: Path) -> None:
    (folder / "mapped").write_bytes(bytes(8192))
    kernel.run(
        "import mmap\nwith open('mapped', 'r+b') as file, mmap.mmap(file.fileno(), 0) as memory:\n"
        "    memory[5000:5003] = b'abc'\n    memory.flush()"
    )
    assert (folder / "mapped").read_bytes()[4999:5004] == b"\0abc\0"


def test_a_large_file_arrives_whole_both_ways(kernel: Kernel, folder: Path) -> None:
    (folder / "large").write_bytes(os.urandom(9_000_000))
    kernel.run("open('copy', 'wb').write(open('large', 'rb').read())")
    assert (folder / "copy").read_bytes() == (folder / "large").read_bytes()


def test_a_read_only_mount_refuses_and_says_so(kernel: Kernel) -> None:
    with pytest.raises(RuntimeError) as caught:
        kernel.run("open('/doc/new', 'w')")
    assert str(caught.value) == "OSError: [Errno 30] Read-only file system: '/doc/new'"


def test_a_link_that_leads_out_on_the_host_leads_out_in_the_guest_alone(kernel: Kernel, folder: Path) -> None:
    (folder / "out").symlink_to("../secret")
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(RuntimeError) as caught:
        kernel.run("open('out').read()")
    assert "FileNotFoundError" in str(caught.value)
    assert "sandbox:x:1000" in kernel.run("print(open('passwd').read())")


def test_device_nodes_and_set_user_id_do_not_count(kernel: Kernel) -> None:
    lines = kernel.run("print(open('/proc/mounts').read())").splitlines()
    for line in (line for line in lines if " 9p " in line):
        assert {"nosuid", "nodev"} <= set(line.split()[3].split(","))
    with pytest.raises(RuntimeError):
        kernel.run("import os, stat; os.mknod('zero', stat.S_IFCHR | 0o666, os.makedev(1, 5))")


def test_the_hosts_path_is_told_for_what_is_mounted_and_nothing_else(kernel: Kernel, folder: Path) -> None:
    provisioner = kernel.manager.provisioner
    assert provisioner.resolve_path(f"{folder}/data.csv") == f"{folder}/data.csv"
    assert provisioner.resolve_path("/doc/x/copyright") == "/usr/share/doc/x/copyright"
    assert provisioner.resolve_path("/home/sandbox/data.csv") is None


def test_a_server_that_is_killed_costs_its_mount_and_not_the_kernel(kernel: Kernel) -> None:
    servers = [p for p in kernel.supervisor.children(recursive=True) if p.name() == "diod"]
    assert len(servers) == 2
    [documents] = [p for p in servers if "/doc" in " ".join(p.parent().cmdline())]
    documents.kill()
    with pytest.raises(RuntimeError) as caught:
        kernel.run("import os; os.listdir('/doc')")
    assert "OSError: [Errno 5]" in str(caught.value)
    assert kernel.run("print(len(open('data.csv').read()))") == "12"


def test_a_restarted_kernel_has_its_mounts_again(kernel: Kernel) -> None:
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=READY)
    assert kernel.run("import os; print(os.path.exists('data.csv'), bool(os.listdir('/doc')))") == "True True"


@pytest.mark.parametrize("start", ["auto", "cold"])
def test_limits_of_a_mount_hold_and_are_told(installed: None, tmp_path: Path, start: str) -> None:
    mounts = [f"{tmp_path}:/out:rw,written=1,files=3"]
    with microvm(mounts=mounts, start=start, disk=64) as kernel:
        with pytest.raises(RuntimeError) as caught:
            kernel.run("with open('/out/a', 'wb') as file: file.write(bytes(3 << 19))")
        assert "OSError: [Errno " in str(caught.value)
        seen = kernel.run(
            "try:\n    for number in range(5): open(f'/out/{number}', 'w').close()\n"
            "except OSError as error: print(error.strerror)"
        )
        assert seen == "Disk quota exceeded"
    assert (tmp_path / "a").stat().st_size <= 1 << 20
    assert {path.name for path in tmp_path.iterdir()} == {"a", "0", "1"}


def test_one_directory_can_be_mounted_in_another(installed: None, tmp_path: Path) -> None:
    for name in ("outer", "inner", "outer/place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    mounts = [f"{tmp_path}/inner:/data/place", f"{tmp_path}/outer:/data"]
    with microvm(mounts=mounts) as kernel:
        seen = kernel.run("print(open('/data/file').read(), open('/data/place/file').read())")
        assert seen == "outer inner"


def test_the_cell_that_reaches_a_limit_is_told_which(installed: None, tmp_path: Path) -> None:
    with microvm(mounts=[f"{tmp_path}:/out:rw,files=1"]) as kernel:
        said = kernel.run(
            "for number in range(2):\n    try: open(f'/out/{number}', 'w').close()\n    except OSError: pass"
        )
        assert said == (
            "[sandbox-kernel] The mount on /out has reached its limit (1 files made in the kernel's whole "
            "life); write less there, or raise it in `mounts`."
        )


def refusal(**config: Any) -> str:
    """What a start with that configuration is refused with."""
    made = manager(**config)
    with pytest.raises((ConfigurationError, MountError)) as caught:
        made.start_kernel()
    assert not made.has_kernel or not made.is_alive()
    return str(caught.value)


def test_a_directory_that_is_not_there_is_named(installed: None, tmp_path: Path) -> None:
    assert refusal(mounts=[f"{tmp_path}/none:/data"]) == (
        f"{tmp_path}/none is to be mounted and is no directory on this host; make it, or change `mounts`."
    )


def test_what_keeps_kernels_apart_is_not_mounted(installed: None) -> None:
    from sandbox_kernel import paths

    folder = paths.data_dir().resolve()
    assert refusal(mounts=[f"{folder}/images:/data"]) == (
        f"{folder}/images is to be mounted and belongs to what keeps kernels apart ({folder}); choose "
        "another directory."
    )


def test_an_administrators_roots_bind_the_kernelspec(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_KERNEL_MOUNT_ROOTS", "/usr:ro")
    assert refusal(mounts=[f"{tmp_path}:/data:rw"]) == (
        f"{tmp_path} is to be mounted read-write, and the administrator allows mounts below: /usr:ro "
        "(mount_roots); choose a directory there."
    )


def test_the_kernelspec_here_starts_in_the_notebooks_directory(installed: None, folder: Path) -> None:
    made = KernelManager(kernel_name=HERE)
    made.start_kernel(cwd=str(folder))
    kernel = Kernel(made)
    try:
        assert kernel.run("import os; print(os.getcwd(), open('data.csv').read(3))") == f"{folder} a,b"
        kernel.run("open('from-here', 'w').write('x')")
        assert (folder / "from-here").read_text() == "x"
    finally:
        kernel.client.stop_channels()
        made.shutdown_kernel(now=True)


@pytest.mark.parametrize("victim", ["client's supervisor", "QEMU"])
def test_nothing_serves_on_when_the_vm_is_killed(installed: None, tmp_path: Path, victim: str) -> None:
    with microvm(mounts=[f"{tmp_path}:/data:rw,files=9", "/usr/share/doc:/doc"]) as kernel:
        everything = [kernel.supervisor, *kernel.supervisor.children(recursive=True)]
        assert sum(process.name() == "diod" for process in everything) == 2
        os.kill(kernel.qemu.pid if victim == "QEMU" else kernel.supervisor.pid, signal.SIGKILL)
        assert until(lambda: not alive(everything), LIMIT), alive(everything)
