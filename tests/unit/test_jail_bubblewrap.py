"""The jail's command line, and the jail itself around an ordinary program."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sandbox_kernel.errors import MissingToolError
from sandbox_kernel.jail.bubblewrap import Jail, find

SHELL = str(Path("/bin/sh").resolve())


def jail(tmp_path: Path) -> Jail:
    return Jail(find("bwrap", "x"), Path(SHELL), tmp_path)


def test_a_missing_program_is_named_with_the_fix() -> None:
    with pytest.raises(MissingToolError) as caught:
        find("no-such-program", "install it with `sandbox-kernel setup`")
    assert str(caught.value) == "no-such-program is not installed; install it with `sandbox-kernel setup`."


def test_the_environment_does_not_enter(tmp_path: Path) -> None:
    command = jail(tmp_path).command([SHELL, "-c", "export -p; set"])
    done = subprocess.run(
        command, env={"SECRET": "x", "PATH": "/bin"}, capture_output=True, text=True, check=True
    )
    assert "SECRET" not in done.stdout


def test_the_image_is_there_and_read_only(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_text("kernel\n")
    script = "read word < /image/vmlinux; echo $word; (: > /image/x) 2> /dev/null || echo refused"
    done = subprocess.run(
        jail(tmp_path).command([SHELL, "-c", script]), capture_output=True, text=True, check=True
    )
    assert done.stdout == "kernel\nrefused\n"


@pytest.mark.parametrize(("writable", "option"), [(False, "--ro-bind"), (True, "--bind")])
def test_only_a_templates_maker_may_write_to_its_ram(tmp_path: Path, writable: bool, option: str) -> None:
    command = Jail(
        Path("bwrap"), Path("/bin/true"), tmp_path, ram=tmp_path / "ram", ram_writable=writable
    ).command([])
    place = command.index("/ram")
    assert command[place - 2 : place + 1] == [option, str(tmp_path / "ram"), "/ram"]


def test_the_program_waits_until_it_is_let_go_and_its_pid_is_told(tmp_path: Path) -> None:
    info_reader, info_writer = os.pipe()
    block_reader, block_writer = os.pipe()
    process = subprocess.Popen(
        jail(tmp_path).command([SHELL, "-c", "echo ran"], info_fd=info_writer, block_fd=block_reader),
        pass_fds=(info_writer, block_reader),
        stdout=subprocess.PIPE,
    )
    os.close(info_writer)
    with os.fdopen(info_reader) as info:
        assert Path("/proc", str(json.load(info)["child-pid"])).exists()
    assert process.poll() is None
    os.write(block_writer, b"x")
    assert process.communicate(timeout=10)[0] == b"ran\n"
    os.close(block_reader)
    os.close(block_writer)
