"""The command line: texts and exit statuses, without building anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import sandbox_kernel
from sandbox_kernel.cli.main import main


@pytest.fixture(autouse=True)
def _private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "sandbox-kernel,")


@pytest.mark.parametrize("command", ["setup", "doctor", "image", "kernelspec", "volume", "cp"])
def test_every_command_explains_itself(command: str) -> None:
    assert command in run("--help").output
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("image", "show"), "There is no image 'default'"),
        (("image", "rm", "nothing"), "There is no image 'nothing'"),
        (("image", "show", "../x"), "no name for an image"),
        (("image", "build", "--name", "../x"), "no name for an image"),
        (("image", "build", "--package", "--index-url=http://x"), "no requirement on a package"),
        (("kernelspec", "install", "--image", "nothing"), "There is no image 'nothing'"),
        (("volume", "rm", "nothing"), "There is no volume nothing"),
        (("volume", "create", "../x", "--size", "16"), "no name for a volume"),
        (("volume", "create", "x", "--size", "1"), "is to have 1 MiB"),
    ],
)
def test_an_expected_error_is_one_sentence_and_status_1(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("sandbox-kernel: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert isinstance(result.exception, SystemExit)


def test_images_are_listed_as_nothing_when_there_are_none() -> None:
    assert run("image", "ls").output == "NAME  DIGEST  CREATED  PYTHON  KERNEL  SIZE\n"
    assert json.loads(run("image", "ls", "--json").output) == []


def test_removing_takes_a_name() -> None:
    result = run("image", "rm")
    assert result.exit_code == 2
    assert run("image", "rm", "--unnamed").exit_code == 0


def test_places_of_a_kernelspec_exclude_each_other(tmp_path: Path) -> None:
    result = run("kernelspec", "install", "--user", "--prefix", str(tmp_path))
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_a_kernelspec_is_installed_and_then_up_to_date(tmp_path: Path) -> None:
    arguments = ("kernelspec", "install", "--prefix", str(tmp_path))
    assert "installed:" in run(*arguments).output
    assert "is up to date:" in run(*arguments).output


def test_doctor_is_a_table_for_people_and_json_for_machines() -> None:
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    image = next(row for row in report["requirements"] if row["name"] == "image default")
    assert (result.exit_code, report["ok"]) == (1, False)
    assert (image["status"], image["fix"]) == ("MISSING", "run `sandbox-kernel image build`")
    table = run("doctor")
    assert table.exit_code == 1
    assert all(row["name"].split()[0] in table.output for row in report["requirements"])


@pytest.mark.skipif(os.getuid() != 0, reason="drops root's rights to those of nobody")
def test_setup_tells_a_user_the_one_command_that_gets_the_missing_packages() -> None:
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder)
        programs.chmod(0o755)
        for name in ("apt-get", "sh", "tar"):
            fake = programs / name
            fake.write_text("#!/bin/sh\necho 9.9\n")
            fake.chmod(0o755)
        result = as_nobody(programs, "setup")
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sandbox-kernel: Debian packages are missing; run `sudo apt-get install")
    assert "qemu-system-x86" in last
    assert "Traceback" not in result.stderr


def as_nobody(programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that gave up root after it had imported what it needs."""
    program = (
        "import os, sys\n"
        "import sandbox_kernel.cli.main as cli, sandbox_kernel.host.setup, sandbox_kernel.host.requirements\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from sandbox_kernel.host import programs; programs._SYSTEM = ''\n"
        "cli.main(sys.argv[1:])"
    )
    env = {
        "PATH": str(programs),
        "HOME": "/nonexistent",
        "XDG_DATA_HOME": "/nonexistent",
        "PYTHONPATH": str(Path(sandbox_kernel.__file__).parent.parent),
    }
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


def test_volumes_are_made_listed_and_removed() -> None:
    assert run("volume", "ls").stdout.split() == ["VOLUME", "SIZE", "ON", "HOST", "ATTACHED"]
    assert run("volume", "create", "data", "--size", "32").stdout == "created data, 32 MiB\n"
    [_, row] = run("volume", "ls").stdout.splitlines()
    assert [*row.split()[:3], row.split()[-1]] == ["data", "32", "MiB", "-"]
    assert run("volume", "rm", "data").stdout == "removed data\n"
    assert len(run("volume", "ls").stdout.splitlines()) == 1
