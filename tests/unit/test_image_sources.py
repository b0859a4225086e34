"""Where Debian and Python packages come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import packages
from sandbox_kernel.image.mirror import host_mirror
from sandbox_kernel.image.system import Bootstrap, require_subordinate_ids


def apt(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    for name, text in files.items():
        (tmp_path / name.replace("__", "/").replace("_", ".")).write_text(text)
    return tmp_path


def test_the_hosts_own_debian_mirror_is_taken(tmp_path: Path) -> None:
    text = "# deb http://old/debian x main\ndeb [arch=amd64 trusted=yes] http://m.example/debian x main\n"
    assert host_mirror(apt(tmp_path, sources_list=text)) == "http://m.example/debian"


def test_deb822_sources_are_read_too(tmp_path: Path) -> None:
    text = (
        "Types: deb\nURIs: http://s.example/debian-security\nSuites: x\nComponents: main\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: x\nComponents: main\n\n"
        "Types: deb-src\nURIs: http://src.example/debian\nSuites: x\nComponents: main\n\n"
        "# a comment\nTypes: deb deb-src\nURIs: http://m.example/debian/\n http://n.example/debian\n"
        "Suites: bookworm\nComponents: main contrib\n"
    )
    folder = apt(tmp_path)
    (folder / "sources.list.d/debian.sources").write_text(text)
    assert host_mirror(folder) == "http://m.example/debian/"


@pytest.mark.parametrize(
    "line",
    [
        "deb http://archive.ubuntu.com/ubuntu noble main",
        "deb http://x/debian-security bookworm main",
        "deb http://x/debian bookworm contrib",
        "deb-src http://x/debian bookworm main",
        "deb https://vendor.example/apt stable main",
    ],
)
def test_other_archives_are_not_taken_for_debians(tmp_path: Path, line: str) -> None:
    assert host_mirror(apt(tmp_path, sources_list=line + "\n")) is None


def test_a_host_without_apt_has_no_mirror(tmp_path: Path) -> None:
    assert host_mirror(tmp_path / "nowhere") is None


def test_the_mirror_comes_last_and_only_when_there_is_one() -> None:
    with_one = Bootstrap("trixie", "http://m/debian", Path("/t")).command(
        "minbase", ["python3"], Path("/x.tar")
    )
    assert with_one[-3:] == ["trixie", "/x.tar", "http://m/debian"]
    without = Bootstrap("trixie", None, Path("/t")).command("minbase", ["python3"], Path("/x.tar"))
    assert without[-2:] == ["trixie", "/x.tar"]


def test_a_user_without_subordinate_ids_is_told_how_to_get_some(tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text("alice:100000:65536\n1007:165536:65536\n")
    require_subordinate_ids(0, "root", subuid)
    require_subordinate_ids(1000, "alice", subuid)
    require_subordinate_ids(1007, "carol", subuid)
    for file in (subuid, tmp_path / "missing"):
        with pytest.raises(ImageError, match=r"usermod --add-subuids .* bob"):
            require_subordinate_ids(1001, "bob", file)


def test_pips_configuration_becomes_uvs() -> None:
    listing = (
        ":env:.disable-pip-version-check='1'\n"
        "global.extra-index-url='https://a/simple https://b/simple'\n"
        "global.find-links='/wheels'\n"
        "global.index-url='https://c/simple'\n"
        ":env:.index-url='https://d/simple'\n"
        "install.find-links='/one\\n/two'\n"
    )
    assert packages.from_pip(listing) == {
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/one,/two",
        "UV_DEFAULT_INDEX": "https://d/simple",
    }
    assert packages.from_pip("") == {}


def test_the_guests_python_is_read_off_its_root(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    with pytest.raises(ImageError, match="no /usr/bin/python3"):
        packages.python_version(tmp_path)
    (tmp_path / "usr/bin/python3").symlink_to("python3.14")
    assert packages.site(tmp_path) == tmp_path / "usr/local/lib/python3.14/dist-packages"


@pytest.mark.parametrize(
    ("version", "platform"), [("2.36-9+deb12u13", "manylinux_2_36"), ("2.41-12", "manylinux_2_40")]
)
def test_wheels_run_with_the_roots_c_library(tmp_path: Path, version: str, platform: str) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(f"Package: libc6\nStatus: install ok installed\nVersion: {version}\n")
    assert packages.platform(tmp_path) == f"x86_64-{platform}"


def test_a_root_without_a_c_library_is_refused(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text("Package: musl\nStatus: install ok installed\nVersion: 1.2.5-3\n")
    with pytest.raises(ImageError, match="libc6"):
        packages.platform(tmp_path)
