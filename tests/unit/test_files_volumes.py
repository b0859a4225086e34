"""Where volumes are kept: they appear whole, belong to one writer or several readers, and go when free."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigurationError, HostError, MissingToolError, VolumeBusy
from sandbox_kernel.files import ext4
from sandbox_kernel.files.volumes import LARGEST, Holder, VolumeStore, holders
from sandbox_kernel.jail import bubblewrap


@pytest.fixture
def store(tmp_path: Path) -> VolumeStore:
    return VolumeStore(tmp_path / "volumes")


def test_a_volume_is_a_sparse_private_file_with_a_journal_and_a_root_of_the_kernels_user(
    store: VolumeStore,
) -> None:
    store.create("data", 64)
    assert store.directory.stat().st_mode & 0o777 == 0o700
    file = store.directory / "data"
    assert (file.stat().st_mode & 0o777, file.stat().st_size) == (0o600, 64 << 20)
    [found] = store.all()
    assert (found.name, found.size, found.attached, found.holders) == ("data", 64 << 20, False, ())
    assert found.used < 2 << 20
    tools = [shutil.which(tool, path="/usr/sbin:/sbin") for tool in ("dumpe2fs", "debugfs", "e2fsck")]
    dumpe2fs, debugfs, e2fsck = map(str, tools)
    said = subprocess.run([dumpe2fs, "-h", file], capture_output=True, text=True, check=True).stdout
    [features] = [line.split()[2:] for line in said.splitlines() if line.startswith("Filesystem features")]
    assert {"has_journal", "extent", "metadata_csum"} <= set(features)
    assert "needs_recovery" not in features
    root = subprocess.run([debugfs, "-R", "stat <2>", file], capture_output=True, text=True, check=True)
    assert "User:  1000   Group:  1000" in root.stdout
    subprocess.run([e2fsck, "-f", "-n", file], capture_output=True, check=True)


def test_what_is_made_leaves_nothing_when_it_is_interrupted(store: VolumeStore, tmp_path: Path) -> None:
    broken = tmp_path / "mke2fs"
    broken.write_text("#!/bin/sh\necho 'no luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    with pytest.raises(HostError, match="no luck"):
        ext4.make(broken, fd, journal=True, owner=0, seconds=10)
    os.close(fd)
    store.create("data", 16)
    with pytest.raises(ConfigurationError) as caught:
        store.create("data", 16)
    assert str(caught.value) == "There is a volume data already; remove it, or choose another name."
    assert [path.name for path in store.directory.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["", "A", ".x", "../x", "a/b", "x" * 65, "a\n", "-x"])
def test_a_name_is_bounded(store: VolumeStore, name: str) -> None:
    for attempt in (
        lambda: store.create(name, 16),
        lambda: store.remove(name),
        lambda: store.hold(name, True),
    ):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{name!r} is no name for a volume; use up to 64 lower-case letters, digits, `_`, `.` and `-`, "
            "beginning with a letter or digit."
        )
    assert store.all() == []


@pytest.mark.parametrize("size", [0, -1, 15, LARGEST + 1])
def test_a_size_is_bounded(store: VolumeStore, size: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        store.create("data", size)
    assert str(caught.value) == (f"The volume data is to have {size} MiB; allowed are 16 to 4194304 MiB.")


def test_the_smallest_can_be_made(store: VolumeStore) -> None:
    store.create("small", 16)
    assert store.all()[0].size == 16 << 20


def test_a_missing_mke2fs_is_named(store: VolumeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(ext4, "FOLDERS", ())
    monkeypatch.setattr(bubblewrap, "_SYSTEM", "")
    with pytest.raises(MissingToolError) as caught:
        store.create("data", 16)
    assert str(caught.value) == "mke2fs is not installed; install e2fsprogs, or do without volumes."


def test_one_writes_or_several_read(store: VolumeStore) -> None:
    store.create("data", 16)
    writer = store.hold("data", True)
    me = os.getpid()
    with pytest.raises(VolumeBusy) as caught:
        store.hold("data", True)
    assert str(caught.value) == (
        f"The volume data is attached read-write to the kernel of supervisor {me}, which `sandbox-kernel ps` "
        "shows; shut that kernel down, or have all of them attach it read-only."
    )
    with pytest.raises(VolumeBusy) as caught:
        store.hold("data", False)
    assert str(caught.value) == (
        f"The volume data is attached read-write to the kernel of supervisor {me}, which `sandbox-kernel ps` "
        "shows; shut that kernel down, or have it attach the volume read-only, too."
    )
    assert store.all()[0].holders == (Holder(me, True),)
    os.close(writer)
    readers = [store.hold("data", False) for _ in range(2)]
    for reader in readers:
        assert fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert (store.all()[0].attached, store.all()[0].holders) == (True, (Holder(me, False),))
    with pytest.raises(VolumeBusy, match=f"attached read-only to the kernel of supervisor {me}"):
        store.hold("data", True)
    for reader in readers:
        os.close(reader)
    assert store.all()[0].attached is False


def test_an_attached_volume_is_not_removed(store: VolumeStore) -> None:
    store.create("data", 16)
    reader = store.hold("data", False)
    with pytest.raises(VolumeBusy) as caught:
        store.remove("data")
    assert str(caught.value) == (
        f"The volume data is attached read-only to the kernel of supervisor {os.getpid()}, which "
        "`sandbox-kernel ps` shows; shut that kernel down to remove it."
    )
    os.close(reader)
    store.remove("data")
    assert store.all() == []
    with pytest.raises(ConfigurationError) as missing:
        store.remove("data")
    assert str(missing.value) == (
        "There is no volume data (there are: none); make it with "
        "`sandbox-kernel volume create data --size MIB`."
    )


def test_a_lock_lasts_until_the_last_process_with_the_open_file_is_gone(store: VolumeStore) -> None:
    store.create("data", 16)
    fd = store.hold("data", True)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(fd,)
    ) as heir:
        os.close(fd)
        with pytest.raises(VolumeBusy):
            store.hold("data", False)
        heir.kill()
    os.close(store.hold("data", True))


def test_who_holds_a_volume_is_not_told_where_that_cannot_be_known(
    store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.files.volumes._LOCKS", Path("/proc/nothing"))
    store.create("data", 16)
    fd = store.hold("data", True)
    with pytest.raises(VolumeBusy) as caught:
        store.hold("data", True)
    assert str(caught.value) == (
        "The volume data is attached to another kernel; shut that kernel down, or have all of them attach it "
        "read-only."
    )
    assert (store.all()[0].attached, holders(store.directory / "data")) == (True, ())
    os.close(fd)


def test_what_is_no_file_is_no_volume(store: VolumeStore, tmp_path: Path) -> None:
    store.directory.mkdir()
    (store.directory / "folder").mkdir()
    (tmp_path / "secret").write_text("x")
    (store.directory / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(store.directory / "fifo")
    assert store.all() == []
    for name in ("folder", "link", "fifo"):
        with pytest.raises(HostError):
            store.hold(name, False)
