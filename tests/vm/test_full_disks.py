"""A host whose disk is full: what runs goes on, the person hears which disk it is, and nothing half is kept.

Each file system is a small tmpfs in namespaces of its own, so no root is needed and nothing is left.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_kernel.paths import data_dir
from tests.microvm import READY, until
from tests.vm.test_cleanup import LIMIT

Program = Callable[..., list[str]]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Where the small file system is."""
    (folder := tmp_path / "small").mkdir()
    return folder


@pytest.fixture
def on_a_small_disk(installed: None, small: Path) -> Program:
    """Runs a program with `size` (tmpfs(5)) at `small`, which a variable names; the lines that it prints."""

    def run(code: str, variable: str, size: str, **values: object) -> list[str]:
        run_dir = small.with_name("run")
        run_dir.mkdir(exist_ok=True)
        given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        done = subprocess.run(
            [
                *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
                'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"',
                *("sh", size, str(small), sys.executable, "-c", given + textwrap.dedent(code)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            timeout=READY,
            # In there this user is root, and the folder of the real root's sockets is not his.
            env=os.environ | {"XDG_RUNTIME_DIR": str(run_dir), variable: str(small)},
        )
        assert until(lambda: not list(run_dir.glob("*/*")), LIMIT), list(run_dir.glob("*/*"))
        assert done.returncode == 0
        return [line for line in done.stdout.splitlines() if line]

    return run


WRITES = """
    from tests.microvm import microvm
    cell = '''
    import errno, os
    with open("large", "wb", buffering=0) as file:
        try:
            for _ in range(60): file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        except OSError as error:
            print(errno.errorcode[error.errno])
    '''
    with microvm(disk=200) as kernel:
        print(kernel.run(cell))
        print(kernel.run("import tempfile; 6 * 7"))
        kernel.manager.interrupt_kernel()
        print(open(kernel.manager.provisioner.report["logs"] + "/supervisor.log").read().count(" full "))
    """


def told(folder: Path) -> str:
    return (
        "[sandbox-kernel] The VM's scratch disk could not be written to, as the host's disk is full (No "
        f"space left on device: {folder}/sandbox-kernel); make room there and write the kernel's last files "
        "anew."
    )


def test_a_host_disk_full_under_a_scratch_disk_fails_the_write_and_is_named_in_the_cell(
    on_a_small_disk: Program, small: Path
) -> None:
    said = on_a_small_disk(WRITES, "XDG_CACHE_HOME", "size=24m")
    assert sorted(said) == ["1", "42", "EIO", told(small)]


LATER = """
    import time
    from tests.microvm import READY, microvm, until
    with microvm(disk=200) as kernel:
        log = kernel.manager.provisioner.report["logs"] + "/supervisor.log"
        write = "sleep 1; dd if=/dev/zero of=large bs=1M count=60 conv=fsync"
        kernel.run(f"import subprocess; late = subprocess.Popen({write!r}, shell=True, stderr=-3)")
        assert until(lambda: " full " in open(log).read(), READY)
        print(kernel.run("print(6 * 7)"))
        print(kernel.run("print(7 * 7)"))
    """


def test_a_host_disk_that_fills_up_between_two_cells_is_named_in_the_next_one(
    on_a_small_disk: Program, small: Path
) -> None:
    said = on_a_small_disk(LATER, "XDG_CACHE_HOME", "size=24m")
    assert said == [told(small), "42", "49"]


START = """
    import os
    from pathlib import Path
    from sandbox_kernel.errors import SandboxKernelError
    from tests.microvm import microvm
    folder = Path(folder)
    (folder / "sandbox-kernel").mkdir(mode=0o700)
    names = (folder / str(number) for number in range(1000))
    made = []
    try:
        (folder / "all").write_bytes(bytes(filled))
        for name in names:
            made.append(name)
            name.touch()
    except OSError:
        made.pop()
    for name in made[:free]:
        name.unlink()
    try:
        with microvm(**config) as kernel:
            print(kernel.run("6 * 7"))
    except SandboxKernelError as error:
        print(f"{type(error).__name__}: {error}")
    """


def test_a_runtime_directory_with_no_room_for_sockets_is_named_with_the_fix(
    on_a_small_disk: Program, small: Path
) -> None:
    given = {"folder": str(small), "filled": 0, "config": {}}
    size = "size=4m,nr_inodes=64"
    [none] = on_a_small_disk(START, "XDG_RUNTIME_DIR", size, free=0, **given)
    assert none.startswith("NoSpaceError: The VM's folders cannot be made (No space left on device: ")
    assert none.endswith("); make room there.")
    [few] = on_a_small_disk(START, "XDG_RUNTIME_DIR", size, free=3, **given)
    assert re.match(rf"NoSpaceError: The \w+ channel's socket {small}/sandbox-kernel/\w+/k-\d ", few)
    assert few.endswith(
        "cannot be made (No space left on device); make room there or point XDG_RUNTIME_DIR elsewhere."
    )


@pytest.mark.parametrize(("filled", "size"), [(0, "size=4m,nr_inodes=64"), (4 << 20, "size=4m")])
def test_a_host_disk_with_no_room_for_an_empty_scratch_disk_is_named(
    on_a_small_disk: Program, small: Path, filled: int, size: str
) -> None:
    given = {"folder": str(small), "filled": filled, "config": {"disk": 200}}
    [said] = on_a_small_disk(START, "XDG_CACHE_HOME", size, free=0, **given)
    assert said.startswith(f"NoSpaceError: A scratch disk cannot be made in {small}/sandbox-kernel (")
    assert "No space left" in said
    assert said.endswith("); make room there.")


STORE = """
    from pathlib import Path
    from sandbox_kernel.errors import SandboxKernelError
    from sandbox_kernel.host import template
    from sandbox_kernel.image.progress import Silent
    from sandbox_kernel.spec import VMSpec
    from sandbox_kernel.template.store import TemplateStore
    from tests.microvm import READY, microvm, until
    folder = Path(folder) / "sandbox-kernel"
    folder.mkdir()
    (folder / "images").symlink_to(images)
    """

KERNEL = """
    with microvm(memory=256) as kernel:
        print(kernel.manager.provisioner.report["start"])
        log = Path(kernel.manager.provisioner.report["logs"], "supervisor.log")
        assert until(lambda: "template (" in log.read_text(), READY)
        lines = [line.partition(": ")[2] for line in log.read_text().splitlines() if "template (" in line]
        print(lines[0] if all(lines) else log.read_text())
        print(kernel.run("6 * 7"))
    """

ENSURE = """
    try:
        template.ensure(VMSpec(memory=256), Silent())
    except SandboxKernelError as error:
        print(f"{type(error).__name__}: {error}")
    print([path.name for path in TemplateStore().directory.glob("*") if not path.name.startswith(".lock-")])
    """


@pytest.fixture
def store(small: Path) -> dict[str, str]:
    """What a program needs to have the images, and a store of templates on the small disk."""
    return {"folder": str(small), "images": str(data_dir() / "images")}


def no_space(folder: Path) -> str:
    return f"There is no space left for a template ({folder}/sandbox-kernel/templates); free some."


def test_a_store_too_full_for_a_template_costs_the_template_and_no_kernel(
    on_a_small_disk: Program, small: Path, store: dict[str, str]
) -> None:
    said = on_a_small_disk(STORE + KERNEL + ENSURE, "XDG_DATA_HOME", "size=30m", **store)
    assert said == ["cold", no_space(small), "42", f"NoSpaceError: {no_space(small)}", "[]"]


def test_a_store_that_fills_up_while_a_template_is_made_keeps_nothing_of_it(
    on_a_small_disk: Program, small: Path, store: dict[str, str]
) -> None:
    said = on_a_small_disk(STORE + ENSURE, "XDG_DATA_HOME", "size=110m", **store)
    assert said == [f"NoSpaceError: {no_space(small)}", "[]"]


VOLUME = """
    import os, pathlib
    from sandbox_kernel.files.volumes import VolumeStore
    from sandbox_kernel.paths import data_dir
    from tests.microvm import READY, microvm, until
    small, real = pathlib.Path(os.environ["SMALL"]), data_dir()
    os.environ["XDG_DATA_HOME"] = str(small.parent)
    data_dir().mkdir()
    for name in ("images", "templates"):
        (data_dir() / name).symlink_to(real / name)
    (data_dir() / "volumes").symlink_to(small)
    VolumeStore().create("data", 200)
    cell = '''
    import errno, os
    try:
        with open("/data/large", "wb", buffering=0) as file:
            for _ in range(60): file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        print(errno.errorcode[error.errno])
    '''
    with microvm(volumes=["data:/data:rw"]) as kernel:
        log = kernel.manager.provisioner.report["logs"] + "/supervisor.log"
        print(kernel.run(cell))
        assert until(lambda: " full " in open(log).read(), READY)
        print(kernel.run("print(6 * 7)"))
        print(open(log).read().count(" full "))
    """


def test_a_host_disk_full_under_a_volume_fails_the_write_and_is_named_in_the_cell(
    on_a_small_disk: Program, small: Path
) -> None:
    said = on_a_small_disk(VOLUME, "SMALL", "size=24m")
    assert sorted(said) == [
        "1",
        "42",
        "EIO",
        "[sandbox-kernel] The volume data could not be written to, as the host's disk is full (No space left "
        f"on device: {small.parent}/sandbox-kernel); make room there, restart the kernel and write its last "
        "files anew.",
    ]
