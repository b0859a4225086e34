"""Builds an image, step by step, or finds out that there is nothing to do.

    recipe unchanged, image undamaged       nothing; the name is made to point to it
    only our own programs have changed      root and initramfs of an earlier image are taken apart, the
                                            programs exchanged, and both packed again: seconds
    otherwise                               Debian, kernel, Python packages, programs, compile, pack

All work happens in a folder of the store that belongs to this build alone, under the store's lock, and the
result appears by one rename. Whatever ends the build, the folder is deleted at once; if the builder is
killed, by the next one.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.image import initramfs, kernel, modules, packages, programs, system, tool
from sandbox_kernel.image import manifest as manifests
from sandbox_kernel.image import mirror as mirrors
from sandbox_kernel.image import root as roots
from sandbox_kernel.image.manifest import Manifest
from sandbox_kernel.image.progress import Progress
from sandbox_kernel.image.recipe import Recipe
from sandbox_kernel.image.store import Image, ImageStore, check_name

SPACE = 2_500_000_000
"""Bytes that a build takes on the store's file system while it runs; a quarter of it stays."""
TEMPORARY_SPACE = 1_000_000_000
"""Bytes that mmdebstrap takes beside that, in the temporary directory."""


@dataclass(frozen=True)
class Order:
    """What to build and how.

    Attributes:
        recipe: what the image is made of.
        name: what it will be called.
        mirror: Debian mirror; the host's own, else mmdebstrap's, when None.
        force: build even if nothing has changed, so as to get newer versions.
    """

    recipe: Recipe
    name: str = "default"
    mirror: str | None = None
    force: bool = False


def default_recipe() -> Recipe:
    """The recipe of the image called "default"."""
    return Recipe(programs=programs.collect(), initramfs=programs.initramfs_init())


def build(order: Order, store: ImageStore, progress: Progress) -> tuple[Image, bool]:
    """Makes sure that the store has the image that `order` describes.

    Returns:
        The image, and whether it had to be built.

    Raises:
        ConfigurationError: no image can have such a name.
        HostError: a tool, space, the network or subordinate ids are missing.
    """
    check_name(order.name)

    def waiting() -> None:
        progress.note(f"Another build is going on in {store.directory}; waiting for it to end.")

    with tool.disk_errors(store.directory), store.locked(waiting):
        if not order.force:
            ready = store.built_from(order.recipe.digest())
            if ready is not None:
                return store.call(ready.digest, order.name), False
        tool.require_space(store.directory, SPACE, "Building an image")
        with store.workshop() as workshop:
            finished = workshop / "image"
            finished.mkdir()
            base = None if order.force else store.with_base(order.recipe.base_digest())
            if base is None:
                manifest = _from_scratch(order, store, workshop, finished, progress)
            else:
                manifest = _from_base(order.recipe, base, workshop, finished, progress)
            digest = store.adopt(finished, manifest)
        return store.call(digest, order.name), True


def _from_scratch(
    order: Order, store: ImageStore, workshop: Path, finished: Path, progress: Progress
) -> Manifest:
    recipe, root = order.recipe, workshop / "root"
    system.require_subordinate_ids(os.getuid(), pwd.getpwuid(os.getuid()).pw_name)
    mirror = order.mirror or mirrors.host_mirror()
    with system.temporary_folder(store.directory) as temporary, tool.disk_errors(temporary, workshop):
        tool.require_space(temporary, TEMPORARY_SPACE, "Installing Debian")
        bootstrap = system.Bootstrap(recipe.suite, mirror, temporary)
        # The kernel comes in while Debian is being installed: one waits for the network, one computes.
        with system.fetch_kernel(recipe, bootstrap, workshop / "kernel.tar") as fetching:
            with progress.step(f"Debian {recipe.suite}"):
                system.install(recipe, bootstrap, workshop / "debian.tar", root)
            with progress.step("guest kernel and modules"):
                fetching.output()
                system.unpack_kernel(workshop / "kernel.tar", workshop / "kernel")
                _write_kernel(recipe, workshop / "kernel", finished)
    with progress.step("Python packages"):
        packages.install(root, recipe.python_packages, workshop)
    with progress.step("compiling Python"):
        roots.prepare(root, recipe.suite)
        roots.put_programs(root, recipe.contents())
        roots.compile_python(root)
    return _pack(recipe, root, finished, progress)


def _from_base(recipe: Recipe, base: Image, workshop: Path, finished: Path, progress: Progress) -> Manifest:
    root = workshop / "root"
    with progress.step(f"unpacking image {base.digest[:12]}, of which all but our own programs is the same"):
        roots.unpack(base.root, root)
    with progress.step("exchanging programs"):
        roots.put_programs(root, recipe.contents())
        roots.compile_python(root, everything=False)
        entries = initramfs.with_init(initramfs.read(base.initrd.read_bytes()), recipe.initramfs)
        (finished / "initrd").write_bytes(initramfs.archive(entries))
        shutil.copyfile(base.vmlinux, finished / "vmlinux")
    return _pack(recipe, root, finished, progress)


def _write_kernel(recipe: Recipe, parts: Path, finished: Path) -> None:
    vmlinuz = next(iter((parts / "boot").glob("vmlinuz-*")))
    release = vmlinuz.name.removeprefix("vmlinuz-")
    (finished / "vmlinux").write_bytes(kernel.extract(vmlinuz.read_bytes()))
    loaded = modules.in_load_order(_merged(parts, f"lib/modules/{release}"), recipe.kernel_modules)
    busybox = _merged(parts, "bin/busybox").read_bytes()
    entries = initramfs.entries(recipe.initramfs, busybox, loaded)
    (finished / "initrd").write_bytes(initramfs.archive(entries))


def _merged(parts: Path, path: str) -> Path:
    """Where a package has what lies below /usr since Debian 13: packages of older ones have it at the top."""
    return parts / "usr" / path if (parts / "usr" / path).exists() else parts / path


def _pack(recipe: Recipe, root: Path, finished: Path, progress: Progress) -> Manifest:
    with progress.step("root file system"):
        roots.pack(root, finished / "root.erofs")
    with progress.step("hashes and manifest"):
        release, kernel_build = kernel.banner((finished / "vmlinux").read_bytes())
        return Manifest(
            format=manifests.FORMAT,
            builder=importlib.metadata.version("sandbox-kernel"),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            input_digest=recipe.digest(),
            base_digest=recipe.base_digest(),
            inputs=recipe.inputs(),
            python=packages.python_version(root),
            kernel=release,
            kernel_build=kernel_build,
            debian=system.packages(root),
            packages=packages.versions(root),
            files={name: manifests.hash_file(finished / name) for name in manifests.FILES},
        )
