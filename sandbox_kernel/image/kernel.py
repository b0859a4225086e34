"""The guest kernel as QEMU boots it fastest: the ELF image that is packed inside a distribution's `vmlinuz`.

A bzImage is a boot sector and set-up code, then a small program that unpacks the real kernel, carried along
as a compressed payload. Emulated, that unpacking costs seconds; unpacked here it costs none, since QEMU loads
an ELF kernel directly (by the PVH entry point in its notes). The header says where the payload is (Linux,
Documentation/arch/x86/boot.rst):

    0x1F1  setup_sects     1 byte   size of the set-up code in sectors; 0 means 4
    0x202  magic "HdrS"    4 bytes
    0x206  version         2 bytes  2.08 or later has the next two
    0x248  payload_offset  4 bytes  from the beginning of the protected-mode code
    0x24C  payload_length  4 bytes

For every compression but gzip the payload ends with 4 bytes that hold the unpacked size.
"""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from collections.abc import Callable

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import tool

_SECTOR = 512
_ELF = b"\x7fELF"
_GZIP = b"\x1f\x8b"


def extract(vmlinuz: bytes) -> bytes:
    """The uncompressed ELF kernel in a bzImage.

    Raises:
        ImageError: it is no bzImage, or is packed in a way that is not known here.
        MissingToolError: the tool that unpacks it is not installed.
    """
    packed = payload(vmlinuz)
    for magic, unpack in _UNPACKERS:
        if packed.startswith(magic):
            try:
                kernel = unpack(packed)
            except (lzma.LZMAError, zlib.error) as error:
                raise ImageError(
                    f"The guest kernel's payload is damaged ({error}); build the image again."
                ) from error
            break
    else:
        raise ImageError(
            f"The guest kernel is packed in an unknown way (it begins with {packed[:6].hex()}); known are "
            "gzip, xz, lzma, lz4 and zstd."
        )
    announced = len(kernel) if packed.startswith(_GZIP) else struct.unpack("<I", packed[-4:])[0]
    if not kernel.startswith(_ELF) or len(kernel) != announced:
        raise ImageError("What the guest kernel's payload unpacks to is not a whole ELF file; build again.")
    return kernel


def payload(vmlinuz: bytes) -> bytes:
    """The compressed payload of a bzImage, with its size at the end.

    Raises:
        ImageError: the header is not that of a bzImage with a payload, or points outside of the file.
    """
    if len(vmlinuz) < 0x250 or vmlinuz[0x202:0x206] != b"HdrS":
        raise ImageError("The guest kernel is no x86 bzImage; the Debian package is not what was expected.")
    (version,) = struct.unpack_from("<H", vmlinuz, 0x206)
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    begin = ((vmlinuz[0x1F1] or 4) + 1) * _SECTOR + offset
    if version < 0x208 or length <= 4 or begin + length > len(vmlinuz):
        raise ImageError("The guest kernel's header points outside of the file; build the image again.")
    return vmlinuz[begin : begin + length]


def banner(kernel: bytes) -> tuple[str, str]:
    """Release and build of an unpacked kernel, such as `6.12.57+deb13-amd64` and `… Debian 6.12.57-1 (…)`.

    Raises:
        ImageError: there is no banner in it.
    """
    match = re.search(rb"Linux version (\S+) [^\n\0]*?(#\d[^\n\0]*)", kernel)
    if match is None:
        raise ImageError("The guest kernel carries no version; the Debian package is not what was expected.")
    return match[1].decode(), match[2].decode(errors="replace")


def _gzip(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    kernel = unpacker.decompress(packed)
    if not unpacker.eof:
        raise zlib.error("it is cut off")
    return kernel


def _lzma(packed: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(packed[:-4])


def _by_tool(*argv: str) -> Callable[[bytes], bytes]:
    def unpack(packed: bytes) -> bytes:
        return tool.run(argv, purpose=f"Unpacking the guest kernel with {argv[0]}", stdin=packed[:-4])

    return unpack


_UNPACKERS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (_GZIP, _gzip),
    (b"\xfd7zXZ\x00", _lzma),
    (b"\x5d\x00\x00", _lzma),
    (b"\x28\xb5\x2f\xfd", _by_tool("zstd", "-dcq")),
    (b"\x02\x21\x4c\x18", _by_tool("lz4", "-dcq")),
)
