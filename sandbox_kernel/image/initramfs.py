"""The initramfs: a cpio archive that the kernel unpacks into memory and runs `/init` from.

It is in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), uncompressed
because unpacking costs more than reading under emulation:

    "070701", then 13 fields of 8 hexadecimal digits: inode, mode, uid, gid, links, mtime, size of the
    content, device major and minor, special file's major and minor, length of the name with its final
    NUL, checksum (0); then the name and the content, each padded with NULs to a multiple of 4.
    An entry named TRAILER!!! ends the archive.

The content is a function of its inputs alone: no time, no owner, no order but ours.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.modules import Module

ORDER = "modules/order"
"""Names of the modules in the order to load them, one a line."""
_FOLDERS = ("bin", "dev", "modules", "new", "overlay", "proc", "root")


@dataclass(frozen=True)
class Entry:
    """One file of the archive: path without a leading slash, mode with its type, content, device numbers."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def entries(init: str, busybox: bytes, modules: Iterable[Module]) -> list[Entry]:
    """What the initramfs holds: busybox, modules, the order to load them in, and the script."""
    loaded = tuple(modules)
    order = "".join(f"{module.name}\n" for module in loaded)
    return [
        *(Entry(folder, stat.S_IFDIR | 0o755) for folder in _FOLDERS),
        # The kernel opens it for the first process before anything is mounted.
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        *(Entry(f"modules/{module.name}.ko", stat.S_IFREG | 0o644, module.content) for module in loaded),
        Entry(ORDER, stat.S_IFREG | 0o644, order.encode()),
        Entry("init", stat.S_IFREG | 0o755, init.encode()),
    ]


def archive(files: Iterable[Entry]) -> bytes:
    """The cpio archive of `files`, in their order."""
    parts = [_record(number, entry) for number, entry in enumerate(files, start=1)]
    parts.append(_record(0, Entry("TRAILER!!!", 0)))
    return b"".join(parts)


def _record(number: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def read(data: bytes) -> list[Entry]:
    """The entries of an archive that `archive` wrote.

    Raises:
        ImageError: the bytes are no such archive.
    """
    found: list[Entry] = []
    at = 0
    try:
        while True:
            if data[at : at + 6] != b"070701":
                raise ValueError(f"no header at byte {at}")
            fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
            mode, size, name_size = fields[1], fields[6], fields[11]
            name = data[at + 110 : at + 110 + name_size - 1].decode()
            begin = at + (110 + name_size + 3) // 4 * 4
            at = begin + (size + 3) // 4 * 4
            if name == "TRAILER!!!":
                return found
            if at > len(data):
                raise ValueError(f"{name} is cut off")
            found.append(Entry(name, mode, data[begin : begin + size], (fields[9], fields[10])))
    except ValueError as error:
        raise ImageError(
            f"An image's initramfs is damaged ({error}); build it again with --force."
        ) from error


def with_init(files: Iterable[Entry], init: str) -> list[Entry]:
    """The same entries with another script as `/init`."""
    return [
        dataclasses.replace(entry, content=init.encode()) if entry.name == "init" else entry
        for entry in files
    ]
