"""Programs on a made-up search path: found, too old, silent, missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_kernel.host import debian
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.host.programs import PROGRAMS, Program, check, parse_version

QEMU = next(program for program in PROGRAMS if program.name == "qemu-system-x86_64")


def fake(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "ok", "found"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", True, "7.2.22"),
        ("QEMU emulator version 7.2", True, "7.2"),
        ("QEMU emulator version 10.0.2 (v10.0.2-dirty)", True, "10.0.2"),
        ("QEMU emulator version 7.1.99", False, "7.1.99, older than 7.2"),
        ("QEMU emulator version 5.2.0", False, "5.2.0, older than 7.2"),
        ("no idea", False, "tells no version"),
    ],
)
def test_a_program_is_as_good_as_its_version(tmp_path: Path, says: str, ok: bool, found: str) -> None:
    fake(tmp_path, QEMU.name, f"echo '{says}'")
    finding = check(QEMU, path=str(tmp_path))
    assert (finding.ok, finding.found) == (ok, found)
    assert finding.packages == (() if ok else ("qemu-system-x86",))
    assert finding.fatal is not ok


def test_a_missing_program_names_its_package(tmp_path: Path) -> None:
    finding = check(QEMU, path=str(tmp_path))
    assert finding.fatal
    assert (finding.found, finding.fix) == ("missing", "install the package qemu-system-x86")


def test_a_version_on_standard_error_with_a_failing_exit_counts(tmp_path: Path) -> None:
    fake(tmp_path, "tool", "echo 'tool 1.8.5' >&2; exit 1")
    assert check(Program("tool", "p", "x", minimum=(1, 5)), path=str(tmp_path)).found == "1.8.5"


def test_a_program_that_cannot_be_run_is_not_good_enough(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"\x7fELF garbage")
    (tmp_path / "tool").chmod(0o755)
    assert not check(Program("tool", "p", "x", minimum=(1, 0)), path=str(tmp_path)).ok


def test_what_only_users_need_is_not_needed_by_root(tmp_path: Path) -> None:
    newuidmap = next(program for program in PROGRAMS if program.name == "newuidmap")
    assert not check(newuidmap, path=str(tmp_path), root=True).fatal
    assert check(newuidmap, path=str(tmp_path), root=False).fatal


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("bubblewrap 0.8.0", (0, 8, 0)),
        ("mkfs.erofs 1.5", (1, 5)),
        ("*** Zstandard CLI (64-bit) v1.5.4, by Yann Collet ***", (1, 5, 4)),
        ("tar (GNU tar) 1.34", (1, 34)),
        ("", None),
        ("version 7", None),
    ],
)
def test_versions_are_read_from_what_programs_say(text: str, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version


def test_only_what_is_needed_and_missing_gets_installed_and_once() -> None:
    findings = [
        Finding("a", False, True, "", packages=("erofs-utils",)),
        Finding("b", False, True, "", packages=("erofs-utils",)),
        Finding("c", False, False, "", packages=("optional",)),
        Finding("d", True, True, "", packages=("there",)),
        Finding("e", False, True, "", packages=("zstd",)),
    ]
    assert debian.missing_packages(findings) == ("erofs-utils", "zstd")


def test_the_command_for_the_administrator_is_one_line() -> None:
    command = debian.install_command(["erofs-utils", "zstd"])
    assert command == "sudo apt-get install --no-install-recommends erofs-utils zstd"


def test_missing_old_or_ignorant_package_lists_are_not_good(tmp_path: Path) -> None:
    assert not debian.lists_are_good(["zstd"], tmp_path)
    (tmp_path / "x_InRelease").write_text("")
    os.utime(tmp_path / "x_InRelease", (1, 1))
    assert not debian.lists_are_good(["zstd"], tmp_path)
    os.utime(tmp_path / "x_InRelease")
    assert not debian.lists_are_good(["no-such-package-anywhere"], tmp_path)
