"""The kernelspec: where it goes, what is filled in, and that a second time changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager

from sandbox_kernel.errors import ConfigurationError, HostError
from sandbox_kernel.host import kernelspec
from sandbox_kernel.host.kernelspec import Installation


def test_it_goes_below_a_prefix_with_this_interpreter(tmp_path: Path) -> None:
    folder, written = kernelspec.install(Installation(prefix=str(tmp_path)))
    assert written
    assert folder == tmp_path / "share/jupyter/kernels/python3-microvm"
    spec = json.loads((folder / "kernel.json").read_text())
    assert spec["argv"] == [sys.executable, "-m", "sandbox_kernel.launch", "-f", "{connection_file}"]
    assert (folder / "logo-svg.svg").exists()


def test_a_second_time_nothing_is_written(tmp_path: Path) -> None:
    kernelspec.install(Installation(prefix=str(tmp_path)))
    assert kernelspec.install(Installation(prefix=str(tmp_path)))[1] is False
    (tmp_path / "share/jupyter/kernels/python3-microvm/kernel.json").write_text("{}")
    assert kernelspec.install(Installation(prefix=str(tmp_path)))[1] is True


def test_the_users_place_is_where_jupyter_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    folder, _ = kernelspec.install(Installation())
    assert folder == tmp_path / "kernels/python3-microvm"
    assert KernelSpecManager().get_kernel_spec("python3-microvm").resource_dir == str(folder)
    assert kernelspec.check().found == str(folder)


def test_an_image_gets_a_kernelspec_of_its_own(tmp_path: Path) -> None:
    folder, _ = kernelspec.install(Installation(name="Science", prefix=str(tmp_path), image="science"))
    spec = json.loads((folder / "kernel.json").read_text())
    assert folder.name == "science"
    assert spec["display_name"] == "Python 3 (micro-VM, science)"
    assert spec["metadata"]["kernel_provisioner"]["config"] == {"image": "science"}


@pytest.mark.parametrize("name", ["a b", "../x", "", "..", "ä"])
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="no name for a kernelspec"):
        kernelspec.install(Installation(name=name, prefix=str(tmp_path)))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "share").write_text("a file")
    with pytest.raises(HostError, match="choose another place"):
        kernelspec.install(Installation(prefix=str(tmp_path)))


def test_somebody_elses_kernelspec_of_that_name_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    folder = tmp_path / "kernels/python3-microvm"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["x"], "display_name": "x", "language": "python"}')
    finding = kernelspec.check()
    assert finding.fatal
    assert finding.fix == "run `sandbox-kernel kernelspec install`"
