"""Images built for real: what a guest finds in one, and what killed, second and repeated builders do.

One small image is built from nothing (Debian, kernel, one package). The other builds differ from it in our
own programs only and take seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import pytest

from sandbox_kernel.image import programs, system
from sandbox_kernel.image.build import Order, build
from sandbox_kernel.image.programs import Program
from sandbox_kernel.image.recipe import Recipe
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.qemu.command import QemuConfig, command_line

pytestmark = pytest.mark.timeout(900)

DEADLINE = 60.0
END = "import termios; termios.tcdrain(1); open('/proc/sysrq-trigger', 'w').write('b')\n"
"""Ends the guest once its console has been written."""

FACTS = (
    """
import json, os, pwd, subprocess, sys
def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True)
verbose = run("/usr/bin/python3", "-v", "-c", "import json, six, email.parser").stderr
user = pwd.getpwnam("sandbox")
with open("/proc/mounts") as mounts:
    root = [line.split()[2] for line in mounts if line.split()[1] == "/"]
print("FACTS " + json.dumps({
    "user": [user.pw_uid, user.pw_gid, user.pw_dir, os.path.isdir(user.pw_dir)],
    "hostname": open("/etc/hostname").read(),
    "machine": open("/etc/machine-id").read(),
    "resolver": open("/etc/resolv.conf").read(),
    "matching": verbose.count(" matches "),
    "stale": [line for line in verbose.splitlines() if "stale" in line or "wrote" in line],
    "six": run("/usr/bin/python3", "-c", "import six; print(six.__file__)").stdout.strip(),
    "root": root[-1],
    "upper_blocks": os.statvfs("/").f_blocks * os.statvfs("/").f_frsize,
    "owners": sorted({os.lstat(name).st_uid for name in ("/", "/etc/shadow", "/usr/bin/python3", "/home")}),
    "writable": not os.system("echo x > /etc/written"),
    "setuid": run("find", "/usr", "-xdev", "-perm", "/6000", "-type", "f").stdout.split(),
    "arguments": sys.orig_argv,
    "modules": sorted(line.split()[0] for line in open("/proc/modules")),
}), flush=True)
"""
    + END
)

BUILDER = """
import contextlib, sys
from pathlib import Path
from sandbox_kernel.image import programs
from sandbox_kernel.image.build import Order, build
from sandbox_kernel.image.programs import Program
from sandbox_kernel.image.recipe import Recipe
from sandbox_kernel.image.store import ImageStore

class Told:
    @contextlib.contextmanager
    def step(self, title):
        print("step", title, flush=True)
        yield
    def note(self, text):
        print("note", text, flush=True)

store, init = sys.argv[1:]
recipe = Recipe((Program("init.py", init.encode()),), programs.initramfs_init(), debian_packages=("python3",),
                python_packages=("six",))
image, built = build(Order(recipe, "other"), ImageStore(Path(store)), Told())
print("built" if built else "found", image.digest, flush=True)
"""


class Steps:
    """Remembers which steps were taken."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.titles.append(title)
        yield

    def note(self, text: str) -> None:
        self.titles.append(text)


def recipe(init: str) -> Recipe:
    return Recipe(
        programs=(Program("init.py", init.encode()),),
        initramfs=programs.initramfs_init(),
        debian_packages=("python3",),
        python_packages=("six",),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageStore]:
    folder = tmp_path_factory.mktemp("images")
    build(Order(recipe(FACTS), "small"), ImageStore(folder), Steps())
    yield ImageStore(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def facts(store: ImageStore) -> dict[str, object]:
    console = boot(store.open("small"), "sandbox.upper=48")
    line = next((line for line in console.splitlines() if line.startswith("FACTS ")), None)
    assert line is not None, console
    found: dict[str, object] = json.loads(line.removeprefix("FACTS "))
    return found


def boot(image: Image, *arguments: str) -> str:
    """What the guest writes to its console until it ends."""
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    ours, theirs = socket.socketpair()
    config = QemuConfig(
        binary=PurePosixPath(qemu),
        image=PurePosixPath(image.directory),
        memory=256,
        vcpus=1,
        accelerator="tcg",
        console_fd=theirs.fileno(),
        kernel_arguments=arguments,
    )
    with ours, subprocess.Popen(command_line(config), pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(DEADLINE)
        text = b""
        try:
            while chunk := ours.recv(65536):
                text += chunk
        finally:
            process.kill()
    return text.decode(errors="replace").replace("\r\n", "\n")


def builder(store: ImageStore, init: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(store.directory), init]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} was never said: {process.stderr and process.stderr.read()}")


def unfinished(store: ImageStore) -> list[Path]:
    return list(store.directory.glob(".build-*"))


def test_the_guest_uses_its_compiled_python(facts: dict[str, object]) -> None:
    assert facts["stale"] == []
    assert isinstance(facts["matching"], int)
    assert facts["matching"] > 20


def test_the_guest_has_its_user_and_no_identity_of_the_host(facts: dict[str, object]) -> None:
    assert facts["user"] == [1000, 1000, "/home/sandbox", True]
    assert (facts["hostname"], facts["machine"], facts["resolver"]) == ("sandbox\n", "", "")


def test_the_guest_is_roots_throughout_and_nothing_raises_privileges(facts: dict[str, object]) -> None:
    assert facts["owners"] == [0]
    assert facts["setuid"] == []


def test_the_guest_writes_to_memory_of_the_size_asked_for(facts: dict[str, object]) -> None:
    assert (facts["root"], facts["writable"]) == ("overlay", True)
    assert facts["upper_blocks"] == 48 * 1024 * 1024


def test_packages_lie_where_the_guests_python_finds_them(facts: dict[str, object], store: ImageStore) -> None:
    python = store.open("small").manifest.python
    assert facts["six"] == f"/usr/local/lib/python{python}/dist-packages/six.py"


def test_the_first_program_is_run_isolated_and_with_its_drivers(facts: dict[str, object]) -> None:
    assert facts["arguments"] == ["/usr/bin/python3", "-I", "-S", "/usr/lib/sandbox-kernel/init.py"]
    assert isinstance(facts["modules"], list)
    assert {"erofs", "overlay", "virtio_blk", "vmw_vsock_virtio_transport", "virtio_rng", "9p"} <= set(
        facts["modules"]
    )


def test_the_manifest_names_every_package(store: ImageStore) -> None:
    manifest = store.open("small").manifest
    assert {"python3", "libc6", "bash"} <= set(manifest.debian)
    assert list(manifest.packages) == ["six"]
    assert manifest.kernel.endswith("-amd64")
    assert "Debian" in manifest.kernel_build


def test_a_probe_says_so_and_ends(store: ImageStore) -> None:
    assert "SANDBOX-KERNEL-PROBE-OK" in boot(store.open("small"), "sandbox.probe")


def test_a_step_that_fails_is_named_on_the_console(store: ImageStore) -> None:
    console = boot(store.open("small"), "sandbox.upper=1x")
    assert "SANDBOX-KERNEL-BOOT-FAILED: reading sandbox.upper=1x" in console


def test_a_guest_without_its_first_program_says_so(store: ImageStore) -> None:
    empty = dataclasses.replace(recipe(""), programs=(Program("other.py", b""),))
    image, _ = build(Order(empty, "empty"), store, Steps())
    console = boot(image)
    assert "SANDBOX-KERNEL-BOOT-FAILED: looking for /usr/bin/python3 and" in console


def test_an_unchanged_recipe_is_not_built_again(store: ImageStore) -> None:
    steps = Steps()
    image, built = build(Order(recipe(FACTS), "again"), store, steps)
    assert (built, steps.titles) == (False, [])
    assert image.digest == store.open("small").digest == store.open("again").digest


def test_changed_programs_do_not_install_debian_again(store: ImageStore) -> None:
    steps = Steps()
    image, built = build(Order(recipe("print('changed', flush=True)\n" + END), "changed"), store, steps)
    assert built
    assert not any("Debian" in title or "Python packages" in title for title in steps.titles)
    assert image.manifest.packages == store.open("small").manifest.packages
    assert "changed\n" in boot(image)


def test_a_program_that_does_not_compile_is_no_image(store: ImageStore) -> None:
    before = {path.name for path in store.directory.iterdir()}
    with pytest.raises(Exception, match="Compiling the guest's programs failed"):
        build(Order(recipe("def broken(:\n"), "broken"), store, Steps())
    assert {path.name for path in store.directory.iterdir()} == before


def test_what_a_killed_builder_leaves_is_gone_after_the_next_build(store: ImageStore) -> None:
    with builder(store, "killed = 1\n") as process:
        read_until(process, "step root file system")
        process.kill()
    assert len(unfinished(store)) == 1
    build(Order(recipe("after = 1\n"), "after"), store, Steps())
    assert unfinished(store) == []


def test_a_builder_killed_while_it_installs_debian_takes_its_tools_with_it(tmp_path: Path) -> None:
    fresh = ImageStore(tmp_path / "images")
    with builder(fresh, "killed = 2\n") as process:
        read_until(process, "step Debian")
        tools = wait_for_tools(process.pid)
        process.kill()
    assert psutil.wait_procs(tools, timeout=DEADLINE)[1] == []
    with system.temporary_folder(fresh.directory) as temporary:
        assert list(temporary.iterdir()) == []
    assert not temporary.exists()
    with fresh.locked(), fresh.workshop():
        assert len(unfinished(fresh)) == 1
    assert unfinished(fresh) == []


def test_an_interrupted_builder_leaves_nothing_at_once(store: ImageStore) -> None:
    with builder(store, "interrupted = 1\n") as process:
        read_until(process, "step root file system")
        process.send_signal(2)
        assert process.wait(DEADLINE) != 0
    assert unfinished(store) == []


def test_two_builders_at_once_build_once(store: ImageStore) -> None:
    with builder(store, "twins = 1\n") as one:
        read_until(one, "step exchanging")
        with builder(store, "twins = 1\n") as other:
            first, _ = one.communicate(timeout=300)
            second, _ = other.communicate(timeout=300)
    assert "note Another build is going on" in second
    assert first.splitlines()[-1].split() == ["built", store.open("other").digest]
    assert second.splitlines()[-1].split() == ["found", store.open("other").digest]


@pytest.mark.skipif(os.getuid() != 0, reason="needs a file system of its own")
def test_a_full_file_system_is_one_sentence_that_names_it(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = 'mount -t tmpfs -o size=40m none "$1" && exec "$2" -m sandbox_kernel.cli.main image build'
    program = ["unshare", "--mount", "sh", "-c", script, "sh", str(small), sys.executable]
    env = {**os.environ, "XDG_DATA_HOME": str(small)}
    result = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("sandbox-kernel: Building an image needs 2.5 GB and the file system ")
    assert str(small) in result.stderr
    assert result.stderr.count("\n") == 1


def wait_for_tools(pid: int) -> list[psutil.Process]:
    """The processes below `pid` as soon as the bootstrap has children of its own."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        below = psutil.Process(pid).children(recursive=True)
        if any(process.name().startswith(("apt", "dpkg")) for process in below if process.is_running()):
            return below
        time.sleep(0.05)
    raise AssertionError("mmdebstrap never started anything")
