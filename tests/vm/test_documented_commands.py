"""Every command in the README's shell blocks, run as it stands there, and its Python block."""

from __future__ import annotations

import configparser
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import pexpect
import pytest

from bench.__main__ import KERNELS
from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.template.store import TemplateStore
from tests.microvm import READY, microvm, until

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
PATIENCE = 600.0
IMAGES = ImageStore().directory


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with the files that the README's commands name."""
    cell = nbformat.v4.new_code_cell("import platform; platform.release()")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    (tmp_path / "requirements.txt").write_text("six\n")
    return tmp_path


@pytest.fixture
def own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for images that nobody else sees."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    yield


@pytest.fixture
def own_templates(own_images: None, tmp_path: Path) -> None:
    """A place for templates that nobody else sees, with the images that everybody has."""
    (tmp_path / "data" / "sandbox-kernel").mkdir(parents=True)
    (tmp_path / "data" / "sandbox-kernel" / "images").symlink_to(IMAGES)


def run(command: str, folder: Path, **environment: str) -> str:
    """What a command says on standard output; it must succeed."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_demo(command: str, folder: Path) -> None:
    said = run(command, ROOT)
    guest = re.search(r"^guest kernel +(\S+)$", said, re.MULTILINE)
    assert guest is not None
    assert guest[1] not in ("", platform.release())
    assert f"host kernel   {platform.release()}" in said
    assert "no network:" in said
    assert "[image/png" in said


def make_test(command: str, folder: Path) -> None:
    # This very test is a part of it; what can be seen from here is that make knows it.
    assert "pytest" in run(f"{command} --dry-run", ROOT)


def pip_install(command: str, folder: Path) -> None:
    """From a wheel built here, without dependencies: both are the index's matter, not the package's."""
    wheels, fresh = folder / "wheels", folder / "fresh"
    run(f"{sys.executable} -m pip wheel -q --no-deps -w {wheels} {ROOT}", folder)
    subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
    run(
        command,
        folder,
        PATH=f"{fresh}/bin:/usr/bin:/bin",
        PIP_NO_INDEX="1",
        PIP_NO_DEPS="1",
        PIP_FIND_LINKS=str(wheels),
    )
    assert (fresh / "bin" / "sandbox-kernel").exists()
    assert (fresh / "share/jupyter/kernels/python3-microvm/kernel.json").exists()
    package = next(fresh.glob("lib/python3*/site-packages/sandbox_kernel"))
    assert (package / "_guest" / "init.py").exists()
    assert (package / "_guest" / "agent_protocol.py").exists()


def setup(command: str, folder: Path) -> None:
    assert "all together" in run(f"{command} 2>&1", folder)


def doctor(command: str, folder: Path) -> None:
    assert "QEMU" in run(command, folder)


def nbconvert(command: str, folder: Path) -> None:
    run(command, folder)
    notebook = nbformat.read(folder / "notebook.nbconvert.ipynb", as_version=4)
    assert notebook.cells[0].outputs[0].data["text/plain"].endswith("amd64'")


def console(command: str, folder: Path) -> None:
    """On a terminal, as a person would use it."""
    child = pexpect.spawn(
        str(BIN / command.split()[0]),
        command.split()[1:],
        cwd=str(folder),
        env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        timeout=READY,
        encoding="utf-8",
        dimensions=(24, 200),
    )
    try:
        child.expect("In .*1")
        child.send("import platform; print('on', platform.node())\r")
        child.expect("on sandbox")
        child.expect("In .*2")
        child.send("exit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)


def build_science(command: str, folder: Path) -> None:
    run(command, folder)
    assert {"scipy", "scikit-learn"} <= set(ImageStore().open("science").manifest.packages)


def build_team(command: str, folder: Path) -> None:
    run(command, folder)
    manifest = ImageStore().open("team").manifest
    assert "six" in manifest.packages
    assert manifest.preload == ("six",)
    assert [each.key["modules"] for each in TemplateStore().all()] == [["six"]]


def list_images(command: str, folder: Path) -> None:
    assert "default" in run(command, folder)


def list_templates(command: str, folder: Path) -> None:
    assert "PRELOADED" in run(command, folder)


def build_template(command: str, folder: Path) -> None:
    assert run(command, folder).startswith("template ")
    modules = [word for name, word in pairwise(command.split()) if name == "--preload"]
    found = [(each.key["modules"], each.key["network"]) for each in TemplateStore().all()]
    assert found == [(modules, "--network" in command)]


def keep_pool(command: str, folder: Path) -> None:
    """Runs until it is ended; what it says of itself meanwhile is `pool status`'s check."""
    own = {"XDG_RUNTIME_DIR": str(folder)}
    pool = subprocess.Popen(
        [str(BIN / command.split()[0]), *command.split()[1:]], env=os.environ | own, stderr=subprocess.DEVNULL
    )
    try:
        assert until(lambda: said_by_pool(own).count(" ready ") == 2, READY)
    finally:
        pool.terminate()
        assert pool.wait(READY) == 0


def said_by_pool(environment: dict[str, str]) -> str:
    return subprocess.run(
        [str(BIN / "sandbox-kernel"), "pool", "status"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    ).stdout


def show_pool(command: str, folder: Path) -> None:
    """There is none here, which is an error with a sentence; `keep_pool` has the other case."""
    done = subprocess.run(
        [str(BIN / command.split()[0]), *command.split()[1:]],
        env=os.environ | {"XDG_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "No pool runs for this user; start one with `sandbox-kernel pool`." in done.stderr


def show_vms(command: str, folder: Path) -> None:
    with microvm() as kernel:
        said = run(command, folder)
        assert kernel.manager.provisioner.report["id"] in said
        assert "CELLS" in said


def write_unit(command: str, folder: Path) -> None:
    units = folder / ".config/systemd/user"
    units.mkdir(parents=True)
    run(command, folder, HOME=str(folder))
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(units / "sandbox-kernel-pool.service")
    program, word = unit["Service"]["ExecStart"].split()
    assert (Path(program), word) == (BIN / "sandbox-kernel", "pool")
    assert unit["Service"]["KillMode"] == "process"
    assert unit["Install"]["WantedBy"] == "default.target"


def make_bench(command: str, folder: Path) -> None:
    said = run(f"{command} --dry-run", ROOT)
    assert "-m bench --trace" in said
    assert "-m bench.density --picture docs/density.png" in said


def bench(command: str, folder: Path) -> None:
    """One turn; in a checkout, but with files written elsewhere."""
    said = run(f"{command} --repeat 1", folder, PYTHONPATH=str(ROOT))
    told = re.sub(" +\n", "\n", said)
    assert all(f"start of {name}\n" in told for name in KERNELS[1:])
    assert said.count("kernel connected") == len(KERNELS) - 1


def bench_anatomy(command: str, folder: Path) -> None:
    """One kernel of each."""
    said = run(f"{command} --count 1 --json parts.json", folder, PYTHONPATH=str(ROOT))
    assert "QEMU: guest RAM, written" in said
    assert "unique memory" in said
    assert (folder / "parts.json").stat().st_size > 100


def bench_density(command: str, folder: Path) -> None:
    """A crowd of two."""
    said = run(f"{command} --counts 1,2 --most 2 --starts-at-once 2", folder, PYTHONPATH=str(ROOT))
    assert said.count("2 starts of python3") == 2
    assert said.count("2 have answered 1+1 with 2") == 2
    assert (folder / "density.png").read_bytes().startswith(b"\x89PNG")


def make_lab(command: str, folder: Path) -> None:
    """What is started; the lab itself takes minutes and is a part of CI of its own."""
    suite = command.partition("make lab-")[2]
    said = run(f"{command} --dry-run", ROOT)
    assert "-m tests.lab" in said
    assert f"--suite {suite}" in said if suite else "--suite" not in said


CHECKS: dict[str, Callable[[str, Path], None]] = {
    "make demo": make_demo,
    "make test": make_test,
    "pip install sandbox-kernel": pip_install,
    "sandbox-kernel setup": setup,
    "sandbox-kernel doctor": doctor,
    "jupyter nbconvert": nbconvert,
    "jupyter console": console,
    "sandbox-kernel image build --name science": build_science,
    "sandbox-kernel image build --name team": build_team,
    "sandbox-kernel image ls": list_images,
    "sandbox-kernel template ls": list_templates,
    "sandbox-kernel template build": build_template,
    "sandbox-kernel pool --size": keep_pool,
    "sandbox-kernel pool status": show_pool,
    "sandbox-kernel pool unit": write_unit,
    "sandbox-kernel ps": show_vms,
    "sandbox-kernel stats": show_vms,
    "make bench": make_bench,
    "make lab": make_lab,
    "python -m bench --trace": bench,
    "python -m bench.anatomy": bench_anatomy,
    "python -m bench.density": bench_density,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme(
    installed: None, command: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    checks = [check for beginning, check in CHECKS.items() if command.startswith(beginning)]
    assert len(checks) == 1, f"nobody checks {command!r}"
    if "image build" in command:
        request.getfixturevalue("own_images")
    if "template build" in command:
        request.getfixturevalue("own_templates")
    checks[0](command, folder)


def test_every_check_is_of_a_command_of_the_readme() -> None:
    assert [
        beginning for beginning in CHECKS if not any(command.startswith(beginning) for command in COMMANDS)
    ] == []


def test_the_readmes_python(installed: None, folder: Path) -> None:
    (code,) = blocks("python")
    (folder / "program.py").write_text(code)
    said = run(f"{sys.executable} program.py", folder)
    assert said.strip().endswith("amd64")
    assert said.strip() != platform.release()
