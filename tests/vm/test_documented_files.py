"""Every command in docs/files.md's shell blocks, run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_kernel.files.volumes import VolumeStore
from tests.microvm import microvm

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "files.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
NOTEBOOK, COPIES, VARIABLES, MOUNTS, VOLUMES = BLOCKS
PATIENCE = 300.0


def type_in(commands: str, folder: Path, **environment: str) -> str:
    """What they say on standard output; the last one must succeed."""
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PWD": str(folder)}
        | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with the files that the document's commands name."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1 2 3")
    return tmp_path


@pytest.mark.parametrize("block", [NOTEBOOK, VARIABLES], ids=["the folder's kernel", "by the environment"])
def test_the_notebook_reads_a_file_beside_it_and_writes_one(
    installed: None, folder: Path, block: str
) -> None:
    """The sum is of a changed file, so that it is not one that the notebook has brought along."""
    file = folder / "notebooks" / "rain.csv"
    file.write_text(file.read_text().replace("Jan,61", "Jan,1061"))
    assert "millimetres in a year: 1734" in type_in(block, folder)
    assert (folder / "notebooks" / "rain.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_on_a_running_kernel_do_what_the_document_says(installed: None, folder: Path) -> None:
    with microvm() as kernel:
        vm = kernel.manager.provisioner.report["id"]
        kernel.run("import os; os.mkdir('results'); open('results/table', 'w').write('from the guest')")
        type_in(COPIES.replace("5f3c:", f"{vm[:8]}:"), folder)
        assert kernel.run("print(open('data.csv').read())") == "a,b\n1,2"
        assert kernel.run("print(open('/tmp/model/weights').read())") == "1 2 3"
        assert (folder / "results" / "table").read_text() == "from the guest"

        mount, show, unmount = re.sub(r"\bVM\b", vm, MOUNTS).splitlines()
        type_in(mount, folder)
        assert kernel.run("print(open('/model/weights').read())") == "1 2 3"
        assert f"{folder}/model:/model" in type_in(show, folder)
        type_in(unmount, folder)
        assert kernel.run("print(os.path.exists('/model/weights'))") == "False"


def test_the_commands_for_volumes_do_what_the_document_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    create, show, remove = VOLUMES.splitlines()
    type_in(create, folder)
    assert "results" in type_in(show, folder)
    assert (VolumeStore().directory / "results").stat().st_size == 2048 << 20
    type_in(remove, folder)
    assert "results" not in type_in(show, folder)
