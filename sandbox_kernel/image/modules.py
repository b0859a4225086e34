"""Which kernel modules the guest loads before its root is there, and in which order.

A module names what it depends on itself, in its `.modinfo` section (`depends=a,b`, written by modpost), so
the order follows from the few files needed, without an index of all four thousand. `modules.builtin` tells
what another kernel has as a module and this one has built in. Dependencies that only a comment in the
source knows ("needs a crc32c implementation at run time") are listed by hand, before their user.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import tool

WANTED = (
    "virtio_pci",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "crc32c_generic",  # libcrc32c, which erofs needs, asks for it when it is loaded
    "erofs",
    "overlay",
    "ext4",  # of the scratch disk
    "virtio_rng",
    "virtio_net",
    "9p",
    "9pnet_fd",
    "9pnet_virtio",
)


@dataclass(frozen=True)
class Module:
    """One module: its name with underscores, and the ELF file's content, unpacked."""

    name: str
    content: bytes


def in_load_order(directory: Path, wanted: Iterable[str] = WANTED) -> tuple[Module, ...]:
    """The modules to load, each after all that it depends on.

    Args:
        directory: a kernel's `lib/modules/RELEASE`.
        wanted: names; what is built in is left out.

    Raises:
        ImageError: a module is neither there nor built in, or two depend on each other.
    """
    files = {_name(file.name): file for file in directory.glob("kernel/**/*.ko*")}
    builtin = {_name(Path(line).name) for line in _lines(directory / "modules.builtin")}
    found: dict[str, Module] = {}

    def add(name: str, on_the_way: tuple[str, ...]) -> None:
        if name in found or name in builtin:
            return
        if name not in files or name in on_the_way:
            chain = " → ".join((*on_the_way, name))
            raise ImageError(
                f"The guest kernel {directory.name} has no usable module {chain}; try another kernel."
            )
        content = _unpack(files[name])
        for dependency in depends(content):
            add(dependency, (*on_the_way, name))
        found[name] = Module(name, content)

    for name in wanted:
        add(_name(name), ())
    return tuple(found.values())


def depends(content: bytes) -> tuple[str, ...]:
    """Names of the modules that an unpacked module depends on directly."""
    match = re.search(rb"\0depends=([A-Za-z0-9_,-]*)\0", b"\0" + content)
    return tuple(_name(name) for name in match[1].decode().split(",") if name) if match else ()


def _name(file: str) -> str:
    return file.split(".ko")[0].replace("-", "_")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []


def _unpack(file: Path) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".xz":
        return lzma.decompress(content)
    if file.suffix == ".gz":
        return gzip.decompress(content)
    if file.suffix == ".zst":
        return tool.run(["zstd", "-dcq"], purpose=f"Unpacking {file.name}", stdin=content)
    return content
