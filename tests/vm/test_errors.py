"""The errors a user meets: each one sentence that says what, the limit and the fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_kernel.errors import (
    AcceleratorError,
    BootError,
    ConfigurationError,
    ImageError,
    KernelStartError,
    MissingToolError,
)
from sandbox_kernel.image.store import Image
from tests.microvm import READY, manager, traces


def error_of(kind: type[Exception], **config: object) -> str:
    """The text of the error that a start with `config` raises; nothing may be left of the attempt."""
    made = manager(**config)
    with pytest.raises(kind) as caught:
        made.start_kernel()
    assert not traces(made.provisioner._vm_id())
    assert not made.has_kernel or not made.is_alive()
    made.cleanup_resources()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_missing_qemu_is_named_with_the_way_to_get_it(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("bwrap", "sh", "mkdir"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert error_of(MissingToolError) == (
        "qemu-system-x86_64 is not installed; install it with `sandbox-kernel setup`."
    )


def test_a_missing_image_is_named_with_the_way_to_build_it(installed: None) -> None:
    text = error_of(ImageError, image="nosuch")
    assert "nosuch" in text
    assert "sandbox-kernel image build" in text


def test_a_damaged_image_is_refused_by_its_hash(
    installed: None, image: Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = tmp_path / "sandbox-kernel" / "images"
    store.mkdir(parents=True)
    copy = store / image.directory.name
    shutil.copytree(image.directory, copy)
    (store / "names").mkdir()
    (store / "names" / "default").symlink_to(Path("..") / copy.name)
    initrd = copy / image.initrd.name
    initrd.chmod(0o600)
    with initrd.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    text = error_of(ImageError)
    assert image.initrd.name in text
    assert "sandbox-kernel image build" in text


@pytest.fixture
def full(tmp_path: Path) -> Path:
    (tmp_path / "full").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "full"


def on_a_full_disk(variable: str, exhausted: str, full: Path) -> subprocess.CompletedProcess[str]:
    """What becomes of a kernel where the file system behind `variable` is full."""
    # tmpfs is mounted in namespaces of its own, so no root is needed and nothing is left.
    return subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount"),
            *(sys.executable, "-m", "tests.vm.full_disk", variable, exhausted, str(full)),
        ],
        capture_output=True,
        text=True,
        timeout=READY,
        # In there this user is root, and the folder of the real root's sockets is not his.
        env=os.environ | {"XDG_RUNTIME_DIR": str(full.with_name("run"))},
    )


def test_a_full_file_system_is_named(installed: None, full: Path) -> None:
    state = on_a_full_disk("XDG_STATE_HOME", "inodes", full)
    assert state.stdout == (
        "NoSpaceError: The VM's folders cannot be made (No space left on device: "
        f"{full}/sandbox-kernel); make room there.\n"
    )
    runtime = on_a_full_disk("XDG_RUNTIME_DIR", "inodes", full)
    assert runtime.stdout == (
        f"NoSpaceError: The runtime directory {full}/sandbox-kernel cannot be made (No space left on "
        "device); make room there or point XDG_RUNTIME_DIR elsewhere.\n"
    )


def test_a_disk_too_full_for_logs_is_announced_and_the_kernel_runs(installed: None, full: Path) -> None:
    done = on_a_full_disk("XDG_STATE_HOME", "blocks", full)
    assert done.stdout == "42\n"
    announced = [line for line in done.stderr.splitlines() if "is incomplete" in line]
    assert len(announced) == 1
    assert "supervisor.log" in announced[0]
    assert "No space left on device" in announced[0]


def test_a_boot_deadline_says_where_the_boot_was_and_where_the_logs_are(installed: None) -> None:
    text = error_of(BootError, boot_timeout=1, start="cold")
    assert "boot_timeout = 1 s" in text
    logs = Path(text.partition("logs: ")[2].partition(")")[0])
    assert (logs / "console.log").exists()


def test_kvm_demanded_and_not_usable_says_why(installed: None, image: Image) -> None:
    from sandbox_kernel.machine import accelerator

    verdict = accelerator.cached(image)
    if verdict is not None and verdict.usable:
        pytest.skip("KVM works on this machine, so nothing can be refused")
    text = error_of(AcceleratorError, accelerator="kvm")
    assert text.startswith("The accelerator 'kvm' was demanded and cannot be used: ")
    assert "choose accelerator = 'auto'" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"memroy": 512}, ["'memroy'", "allowed are image, memory"]),
        ({"memory": 1}, ["memory to 1", "from 192 to 1048576 MiB"]),
        ({"env": "HOME"}, ["env to 'HOME'", "a list of variable names"]),
    ],
)
def test_a_bad_configuration_is_refused_by_key(
    installed: None, config: dict[str, object], words: list[str]
) -> None:
    text = error_of(ConfigurationError, **config)
    for word in words:
        assert word in text


def test_the_administrators_cap_is_named(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_KERNEL_MAX_MEMORY", "512")
    assert "max_memory = 512" in error_of(ConfigurationError, memory=1024)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["/no/such/program", "{connection_file}"], "/no/such/program"),
        (["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}", "--no-such=("], "status"),
    ],
)
def test_a_kernel_command_that_cannot_start_is_named(installed: None, argv: list[str], word: str) -> None:
    made = manager()
    made.kernel_spec.argv = argv
    with pytest.raises(KernelStartError) as caught:
        made.start_kernel()
    assert word in str(caught.value)
    assert not traces(made.provisioner._vm_id())
