"""vmlinuz to vmlinux, on kernels made up here."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import kernel

ELF = b"\x7fELF" + b"Linux version 6.1-test (a@b) (gcc) #1 SMP Debian 6.1-2 (2025-01-01)\n\0" + bytes(5000)


def by_tool(*argv: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if shutil.which(argv[0]) is None:
            pytest.skip(f"{argv[0]} is not installed")
        return subprocess.run(argv, input=data, capture_output=True, check=True).stdout

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": by_tool("zstd", "-c"),
    "lz4": by_tool("lz4", "-l", "-c"),
}


def bzimage(payload: bytes, *, setup_sectors: int = 3, offset: int = 64, version: int = 0x20F) -> bytes:
    head = bytearray((setup_sectors or 4) * 512 + 512 + offset)
    head[0x1F1] = setup_sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + payload + bytes(300)


def sized(packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(ELF))


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("setup_sectors", [0, 3, 39])
def test_a_kernel_is_unpacked_whatever_it_is_packed_with(name: str, setup_sectors: int) -> None:
    packed = PACKERS[name](ELF)
    payload = packed if name == "gzip" else sized(packed)
    assert kernel.extract(bzimage(payload, setup_sectors=setup_sectors)) == ELF


def test_a_file_that_is_no_bzimage_is_refused() -> None:
    for data in (b"", b"MZ" + bytes(0x300), bytes(4096)):
        with pytest.raises(ImageError, match="no x86 bzImage"):
            kernel.extract(data)


def test_a_header_that_points_outside_of_the_file_is_refused() -> None:
    whole = bzimage(sized(lzma.compress(ELF)))
    for cut in (whole[: len(whole) // 2], bzimage(b""), bzimage(sized(lzma.compress(ELF)), version=0x207)):
        with pytest.raises(ImageError, match="points outside"):
            kernel.extract(cut)


def test_an_unknown_packing_is_named() -> None:
    with pytest.raises(ImageError, match=r"begins with 414141.*zstd"):
        kernel.extract(bzimage(b"AAAAAAAAAAAA"))


@pytest.mark.parametrize("name", PACKERS)
def test_a_damaged_payload_is_an_error_of_ours(name: str) -> None:
    packed = PACKERS[name](ELF)
    with pytest.raises(ImageError):
        kernel.extract(bzimage(packed[: len(packed) // 2]))


def test_a_kernel_of_another_size_than_announced_is_refused() -> None:
    with pytest.raises(ImageError, match="unpacks to"):
        kernel.extract(bzimage(lzma.compress(ELF) + struct.pack("<I", len(ELF) + 1)))


def test_a_payload_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(ImageError, match="unpacks to"):
        kernel.extract(bzimage(sized(lzma.compress(b"hello"))))


def test_the_banner_tells_release_and_build() -> None:
    assert kernel.banner(ELF) == ("6.1-test", "#1 SMP Debian 6.1-2 (2025-01-01)")
    with pytest.raises(ImageError, match="no version"):
        kernel.banner(b"\x7fELF")
