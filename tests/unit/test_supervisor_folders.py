"""A VM's folders: claimed, locked, swept, pruned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import HostError
from sandbox_kernel.supervisor import folders


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path


def test_the_folders_are_for_their_owner_alone() -> None:
    claimed = folders.claim("a1")
    assert claimed.runtime.stat().st_mode & 0o777 == 0o700
    assert claimed.logs.stat().st_mode & 0o777 == 0o700
    os.close(claimed.lock)


def test_an_id_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_PATIENCE", 0.1)
    claimed = folders.claim("a1")
    with pytest.raises(HostError, match=r"Another VM owns .*/a1; shut that kernel down first"):
        folders.claim("a1")
    os.close(claimed.lock)


def test_what_a_killed_supervisor_and_guardian_left_is_swept() -> None:
    left = folders.claim("dead")
    (left.runtime / "guest-shell").touch()
    os.close(left.lock)  # what the kernel does to the descriptors of the killed
    alive = folders.claim("alive")
    assert not left.runtime.exists()
    folders.claim("next")
    assert alive.runtime.exists()


def test_the_next_vm_of_an_id_waits_until_the_last_one_is_cleaned_up(tmp_path: Path) -> None:
    last = folders.claim("a1")
    (last.runtime / "k-1").touch()
    child = os.fork()
    if child == 0:  # the guardian: removes the folder, then lets the lock go by ending
        (last.runtime / "k-1").unlink()
        last.runtime.rmdir()
        os._exit(0)
    os.close(last.lock)
    fresh = folders.claim("a1")
    os.waitpid(child, 0)
    assert fresh.runtime.exists()
    assert os.path.samestat(os.fstat(fresh.lock), fresh.runtime.stat())


def test_only_the_newest_logs_of_dead_vms_are_kept(tmp_path: Path) -> None:
    base = tmp_path / "state" / "sandbox-kernel" / "vms"
    base.mkdir(parents=True)
    for number in range(folders.KEPT_LOGS + 5):
        folder = base / f"old{number}-999999999"
        folder.mkdir()
        os.utime(folder, (number, number))
    claimed = folders.claim("a1")
    kept = {folder.name for folder in base.iterdir()} - {claimed.logs.name}
    assert len(kept) == folders.KEPT_LOGS
    assert "old0-999999999" not in kept
    assert claimed.logs.exists()


def test_logs_that_go_while_they_are_looked_at_keep_no_vm_from_starting(tmp_path: Path) -> None:
    base = tmp_path / "state" / "sandbox-kernel" / "vms"
    base.mkdir(parents=True)
    (base / "gone-999999999").symlink_to(tmp_path / "removed")  # listed, and not there when it is asked for
    (base / "old-999999999").mkdir()
    assert folders.claim("a1").logs.exists()


def test_a_folder_that_is_renamed_keeps_its_lock_and_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = folders.claim("waiting")
    (claimed.runtime / "k-1").touch()
    with folders.vacated("taken") as place:
        moved = folders.move(claimed, place)
    assert not claimed.runtime.exists()
    assert (moved.runtime / "k-1").exists()
    monkeypatch.setattr(folders, "_PATIENCE", 0.05)
    with pytest.raises(HostError, match=r"Another VM owns .*/taken"):
        folders.claim("taken")
    folders.sweep(moved.runtime.parent)
    assert (moved.runtime / "k-1").exists()


def test_a_name_in_use_is_not_vacated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_PATIENCE", 0.05)
    folders.claim("taken")
    with pytest.raises(HostError, match="Another VM owns"), folders.vacated("taken"):
        pass


def test_a_reserved_folder_is_one_owners_and_goes_with_him() -> None:
    with folders.reserved("pool-service") as folder:
        (folder / "socket").touch()
        with pytest.raises(HostError), folders.reserved("pool-service"):
            pass
        folders.sweep(folder.parent)
        assert (folder / "socket").exists()
    assert not folder.exists()


def test_a_reserved_folder_of_a_killed_owner_is_taken_over_empty() -> None:
    folder = folders.paths.runtime_dir() / "pool-service"
    folder.mkdir()
    (folder / "socket").touch()
    with folders.reserved("pool-service") as taken:
        assert list(taken.iterdir()) == []
