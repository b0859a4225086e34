"""The initramfs as cpio, judged by the system's own cpio."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import initramfs, programs
from sandbox_kernel.image.modules import Module

MODULES = (Module("libcrc32c", b"one"), Module("erofs", b"seven77"))
ENTRIES = initramfs.entries("#!/bin/busybox sh\n", b"BUSYBOX", MODULES)


def test_cpio_reads_it() -> None:
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    archive = initramfs.archive(ENTRIES)
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=archive, capture_output=True, check=True)
    assert listed.stdout.decode().split() == [entry.name for entry in ENTRIES]
    command = ["cpio", "-i", "--to-stdout", "--quiet", "modules/order", "modules/erofs.ko", "init"]
    read = subprocess.run(command, input=archive, capture_output=True, check=True)
    assert read.stdout == b"seven77libcrc32c\nerofs\n#!/bin/busybox sh\n"


def test_it_reads_back_what_it_wrote() -> None:
    assert initramfs.read(initramfs.archive(ENTRIES)) == ENTRIES


def test_modules_are_listed_in_the_order_to_load_them() -> None:
    order = next(entry for entry in ENTRIES if entry.name == initramfs.ORDER)
    assert order.content == b"libcrc32c\nerofs\n"


def test_the_first_process_has_a_console_and_may_be_run() -> None:
    by_name = {entry.name: entry for entry in ENTRIES}
    assert by_name["dev/console"].device == (5, 1)
    assert stat.S_ISCHR(by_name["dev/console"].mode)
    assert by_name["init"].mode & 0o111
    assert by_name["bin/busybox"].mode & 0o111


def test_folders_stand_before_what_is_in_them() -> None:
    seen: set[str] = {""}
    for entry in ENTRIES:
        assert entry.name.rpartition("/")[0] in seen
        seen.add(entry.name)


def test_another_script_can_be_put_in() -> None:
    changed = initramfs.with_init(ENTRIES, "other\n")
    assert [a.name for a, b in zip(changed, ENTRIES, strict=True) if a != b] == ["init"]


@pytest.mark.parametrize(
    "damage", [lambda a: a[:-200], lambda a: b"", lambda a: b"x" + a, lambda a: a[:5000]]
)
def test_a_damaged_archive_is_an_error_of_ours(damage: object) -> None:
    assert callable(damage)
    archive = initramfs.archive(initramfs.entries("i\n", bytes(9000), MODULES))
    with pytest.raises(ImageError, match="initramfs is damaged"):
        initramfs.read(damage(archive))


def test_the_script_that_goes_in_is_correct_shell() -> None:
    script = programs.initramfs_init()
    checked = subprocess.run(["sh", "-n"], input=script.encode(), capture_output=True)
    assert checked.returncode == 0, checked.stderr
