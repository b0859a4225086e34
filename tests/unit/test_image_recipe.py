"""Recipes: what counts as a change, and what a user may ask for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sandbox_kernel.agent import protocol, tree
from sandbox_kernel.errors import ConfigurationError, ImageError
from sandbox_kernel.image import programs
from sandbox_kernel.image.programs import Program
from sandbox_kernel.image.recipe import Recipe, read_requirements, requirement

RECIPE = Recipe(programs=(Program("init.py", b"print(1)\n"),), initramfs="#!/bin/busybox sh\n")


@pytest.mark.parametrize(
    "change",
    [
        {"programs": (Program("init.py", b"print(2)\n"),)},
        {"programs": (Program("agent.py", b"print(1)\n"),)},
        {"initramfs": "#!/bin/sh\n"},
        {"suite": "forky"},
        {"debian_packages": ("python3",)},
        {"kernel_packages": ("linux-image-cloud-amd64", "busybox-static")},
        {"python_packages": ("ipykernel",)},
        {"builder": 999},
        {"kernel_modules": ("erofs", "overlay")},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_input_changes_the_digest(change: dict[str, object]) -> None:
    assert dataclasses.replace(RECIPE, **change).digest() != RECIPE.digest()


def test_equal_recipes_have_equal_digests() -> None:
    again = Recipe(programs=(Program("init.py", b"print(1)\n"),), initramfs="#!/bin/busybox sh\n")
    assert again.digest() == RECIPE.digest()


def test_our_own_programs_leave_the_base_as_it_is() -> None:
    other = dataclasses.replace(RECIPE, programs=(Program("init.py", b"other"),), initramfs="other")
    assert other.base_digest() == RECIPE.base_digest()
    assert RECIPE.with_packages(("six",)).base_digest() != RECIPE.base_digest()


def test_the_order_and_number_of_packages_does_not_matter() -> None:
    one = RECIPE.with_packages(("six", "scipy", "six", "numpy"))
    other = RECIPE.with_packages(("scipy",)).with_packages(("six",))
    assert one.digest() == other.digest()
    assert one.python_packages.count("numpy") == 1


@pytest.mark.parametrize(
    "text", ["six", "six==1.17.0", "scipy >= 1.15", "a.b-c_d[x,y]~=2", "x @ https://h/x.whl"]
)
def test_requirements_on_packages_are_taken(text: str) -> None:
    assert requirement(f" {text} ") == text


@pytest.mark.parametrize(
    "text", ["", "--index-url=http://x", "-e .", "./six", "/tmp/six.whl", "../x", "six\n-e .", "$(id)", "a b"]
)
def test_what_is_an_option_or_a_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no requirement on a package"):
        requirement(text)


def test_a_requirements_file_may_have_comments_hashes_and_continuations(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# science\nscipy==1.15.3 \\\n    --hash=sha256:00ff\n\nsix  # old friend\n")
    assert read_requirements(file) == ("scipy==1.15.3 --hash=sha256:00ff", "six")


@pytest.mark.parametrize("line", ["-r other.txt", "-e .", "--index-url http://x", "-c constraints.txt"])
def test_a_requirements_file_that_points_elsewhere_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(f"six\n{line}\n")
    with pytest.raises(ConfigurationError, match="no options and no other files"):
        read_requirements(file)


def test_a_requirements_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.txt cannot be read"):
        read_requirements(tmp_path / "missing.txt")


def test_the_guest_gets_all_python_files_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "init.py").write_text("1\n")
    (tmp_path / "part").mkdir()
    (tmp_path / "part/more.py").write_text("2\n")
    (tmp_path / "notes.txt").write_text("no program\n")
    names = [program.name for program in programs.collect(tmp_path)]
    assert names == ["init.py", "part/more.py"]


def test_the_guest_speaks_the_hosts_version_of_the_agents_protocol() -> None:
    by_name = {program.name: program.content for program in programs.collect()}
    assert by_name["agent_protocol.py"] == Path(protocol.__file__).read_bytes()
    parts = Path(tree.__file__).parent.glob("*.py")
    assert {name for name in by_name if name.startswith("agent_tree/")} == {
        f"agent_tree/{part.name}" for part in parts
    }
    assert by_name["agent_tree/__init__.py"] == Path(tree.__file__).read_bytes()


def test_a_guest_without_a_first_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"lacks init\.py"):
        programs.collect(tmp_path)


def test_modules_to_preload_make_another_image_on_the_same_base() -> None:
    one, other = (
        RECIPE.with_preload(("numpy", "colorsys")),
        RECIPE.with_preload(("colorsys", "numpy", "numpy")),
    )
    assert one.digest() == other.digest() != RECIPE.digest()
    assert one.base_digest() == RECIPE.base_digest()
    assert one.inputs()["preload"] == ["colorsys", "numpy"]
    assert one.contents()[-1] == Program("preload.json", b'["colorsys", "numpy"]')
