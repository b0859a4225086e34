"""The lab's own image: a Debian with QEMU, Python, all that the tests import, and the project's wheel.

It is built by the project's image builder, so the lab's root is cut like a guest's: what changes often (our
own programs: here PID 1 of the lab, the wheel's modules, the checkout) is exchanged in seconds, the rest is
built when the recipe changes.
"""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import uv

from sandbox_kernel import paths
from sandbox_kernel.host.programs import PROGRAMS
from sandbox_kernel.image import modules
from sandbox_kernel.image.build import Order, build
from sandbox_kernel.image.programs import Program, collect, initramfs_init
from sandbox_kernel.image.progress import Progress
from sandbox_kernel.image.recipe import Recipe
from sandbox_kernel.image.store import Image, ImageStore
from tests.conformance import lock, sources
from tests.conformance.lock import Sdist

CHECKOUT = Path(__file__).resolve().parents[2]
_OF_NETWORKS = (
    *("tun", "nft_ct", "nft_chain_nat", "nft_nat", "nft_masq", "nft_limit", "nft_log", "nfnetlink_log"),
    *("nft_reject_inet", "nft_connlimit", "sch_tbf"),
)
"""What a VM's filter (network/ruleset.py) and limits are made of; later nobody in the lab could load it."""
KERNEL_MODULES = (*modules.WANTED, "kvm_amd", "vhost_vsock", *_OF_NETWORKS)
_DEBIAN = ("python3", "procps", "mount", "util-linux", "debian-archive-keyring", "ca-certificates")
_OF_THE_SUITES = ("flaky", "trio")
"""Packages that Jupyter's own tests import, beside theirs and what ours import."""
_FROM_THE_WHEEL = ("METADATA", "WHEEL", "entry_points.txt")
"""Of the wheel's own papers. The others name the folder and the second in which it was built."""


def cache() -> Path:
    """Where everything of the lab's lies that can be made again."""
    return paths.cache_dir() / "lab"


def recipe(suite: str = "trixie") -> Recipe:
    """What the lab's image is made of, on the Debian release `suite`."""
    programs = {program.package for program in PROGRAMS}
    return Recipe(
        programs=tuple(sorted(_programs(), key=lambda program: program.name)),
        initramfs=initramfs_init(),
        suite=suite,
        debian_packages=tuple(sorted({*_DEBIAN, *programs})),
        python_packages=_requirements(),
        kernel_modules=KERNEL_MODULES,
    )


def ensure(suite: str, store: ImageStore, progress: Progress) -> Image:
    """The lab's image, built or brought up to date when its inputs have changed.

    Raises:
        HostError: a tool, space or the network is missing.
    """
    order = Order(recipe(suite), name=f"lab-{suite}")
    return build(order, store, progress)[0]


def _requirements() -> tuple[str, ...]:
    """What the project and its tests need, from pyproject.toml; the project itself comes as a wheel."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["notebook"], *optional["test"], *_OF_THE_SUITES]
    wanted += [f"{sdist.name}=={sdist.version}" for sdist in _sdists()]
    return tuple(sorted({each for each in wanted if not each.startswith(project["name"])}))


def _sdists() -> list[Sdist]:
    """Those with the tests of Jupyter's own projects that run in the lab, too."""
    return sorted({suite.sdist for suite in lock.select(lock.load(), (), quick=True)}, key=lambda s: s.name)


def _programs() -> Iterator[Program]:
    here = Path(__file__).parent / "guest"
    yield Program("init.py", (here / "init.py").read_bytes())
    yield from (program for program in collect() if program.name == "system.py")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in sorted(listed.stdout.splitlines()):
        file = CHECKOUT / name
        if file.is_file() and not name.startswith("sandbox_kernel/"):
            yield Program(f"checkout/{name}", file.read_bytes())
    yield from _wheel()
    for archive in sources.fetch(_sdists(), paths.cache_dir() / "conformance" / "sources").values():
        yield Program(f"sources/{archive.name}", archive.read_bytes())


def _wheel() -> Iterator[Program]:
    """The project as a user installs it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        words = ["pip", "install", "--quiet", "--no-deps", "--target", folder, str(CHECKOUT)]
        subprocess.run([uv.find_uv_bin(), *words], check=True)
        for file in sorted(target.rglob("*")):
            name = file.relative_to(target).as_posix()
            papers = ".dist-info/" in name
            if file.is_file() and (
                name.startswith(("sandbox_kernel/", "share/")) or (papers and file.name in _FROM_THE_WHEEL)
            ):
                yield Program(f"site/{name}", file.read_bytes())
