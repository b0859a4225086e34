"""Modules come in an order in which they can be loaded."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.modules import depends, in_load_order


def content(*dependencies: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(dependencies).encode() + b"\0retpoline=Y\0"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "kernel/fs").mkdir(parents=True)
    (tmp_path / "kernel/fs/erofs.ko.xz").write_bytes(lzma.compress(content("libcrc32c", "netfs")))
    (tmp_path / "kernel/libcrc32c.ko.gz").write_bytes(gzip.compress(content()))
    (tmp_path / "kernel/netfs.ko").write_bytes(content("libcrc32c"))
    (tmp_path / "kernel/virtio-rng.ko").write_bytes(content("virtio_pci"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio-pci.ko\n")
    return tmp_path


def names(directory: Path, *wanted: str) -> list[str]:
    return [module.name for module in in_load_order(directory, wanted)]


def test_a_module_comes_after_all_it_depends_on(directory: Path) -> None:
    assert names(directory, "erofs") == ["libcrc32c", "netfs", "erofs"]


def test_a_module_comes_once_and_in_the_order_asked_for(directory: Path) -> None:
    assert names(directory, "netfs", "virtio_rng", "erofs") == ["libcrc32c", "netfs", "virtio_rng", "erofs"]


def test_dashes_and_underscores_are_the_same(directory: Path) -> None:
    assert names(directory, "virtio-rng") == names(directory, "virtio_rng") == ["virtio_rng"]


def test_what_is_built_in_is_left_out(directory: Path) -> None:
    assert names(directory, "virtio_pci") == []


def test_modules_come_unpacked(directory: Path) -> None:
    assert all(module.content.startswith(b"\x7fELF") for module in in_load_order(directory, ["erofs"]))


def test_a_missing_module_is_named_with_who_wants_it(directory: Path) -> None:
    (directory / "kernel/libcrc32c.ko.gz").unlink()
    with pytest.raises(ImageError, match="erofs → libcrc32c"):
        in_load_order(directory, ["erofs"])


def test_modules_that_depend_on_each_other_are_refused(directory: Path) -> None:
    (directory / "kernel/a.ko").write_bytes(content("b"))
    (directory / "kernel/b.ko").write_bytes(content("a"))
    with pytest.raises(ImageError, match="a → b → a"):
        in_load_order(directory, ["a"])


def test_dependencies_are_read_from_the_module() -> None:
    assert depends(content("a-b", "c")) == ("a_b", "c")
    assert depends(content()) == ()
    assert depends(b"no modinfo") == ()
