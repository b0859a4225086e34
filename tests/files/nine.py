"""A client of 9p2000.L that says whatever it likes: one call a message of the protocol.

Numbers and bodies as in Linux' include/net/9p/9p.h and diod's protocol.md.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

NOFID = 0xFFFFFFFF
ROOT = 0


class Refused(OSError):
    """The server's Rlerror."""


class Client:
    """One connection; after `attach`, fid 0 is the mounted directory."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(20)
        self._next = 1

    def call(self, kind: int, body: bytes) -> bytes:
        """The body of the answer to one message."""
        self.socket.sendall(struct.pack("<IBH", 7 + len(body), kind, 1) + body)
        size, answer, _ = struct.unpack("<IBH", self._exactly(7))
        content = self._exactly(size - 7)
        if answer == 7:
            [number] = struct.unpack("<I", content)
            raise Refused(number, os.strerror(number))
        assert answer == kind + 1
        return content

    def attach(self, directory: str = "/share", user: str = "sandbox") -> Client:
        self.socket.sendall(
            struct.pack("<IBH", 7 + 14, 100, 0xFFFF) + struct.pack("<I", 65536) + text("9P2000.L")
        )
        size, kind, _ = struct.unpack("<IBH", self._exactly(7))
        assert kind == 101
        self._exactly(size - 7)
        self.call(
            104, struct.pack("<II", ROOT, NOFID) + text(user) + text(directory) + struct.pack("<I", NOFID)
        )
        return self

    def walk(self, *names: str | bytes, at: int = ROOT) -> int:
        """A new fid for what is reached by `names`.

        Raises:
            FileNotFoundError: only a part of the way exists.
        """
        fid, self._next = self._next, self._next + 1
        answer = self.call(110, struct.pack("<IIH", at, fid, len(names)) + b"".join(map(text, names)))
        if struct.unpack_from("<H", answer)[0] != len(names):
            raise FileNotFoundError(names)
        return fid

    def open(self, fid: int, flags: int = os.O_RDONLY) -> int:
        self.call(12, struct.pack("<II", fid, flags))
        return fid

    def create(self, name: str, at: int = ROOT, mode: int = 0o644) -> int:
        """A new file, open for writing; its fid."""
        fid = self.walk(at=at)
        self.call(
            14, struct.pack("<I", fid) + text(name) + struct.pack("<III", os.O_RDWR | os.O_CREAT, mode, 1000)
        )
        return fid

    def read(self, fid: int, count: int = 4096) -> bytes:
        return self.call(116, struct.pack("<IQI", fid, 0, count))[4:]

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        return int(struct.unpack("<I", self.call(118, struct.pack("<IQI", fid, offset, len(data)) + data))[0])

    def content(self, *names: str) -> bytes:
        """What a file has, by its names from the mounted directory on."""
        return self.read(self.open(self.walk(*names)))

    def symlink(self, name: str, target: str) -> None:
        self.call(16, struct.pack("<I", ROOT) + text(name) + text(target) + struct.pack("<I", 1000))

    def mknod(self, name: str, mode: int, major: int = 0, minor: int = 0) -> None:
        self.call(18, struct.pack("<I", ROOT) + text(name) + struct.pack("<IIII", mode, major, minor, 1000))

    def mkdir(self, name: str, at: int = ROOT) -> None:
        self.call(72, struct.pack("<I", at) + text(name) + struct.pack("<II", 0o755, 1000))

    def link(self, fid: int, name: str) -> None:
        self.call(70, struct.pack("<II", ROOT, fid) + text(name))

    def rename(self, old: str, new: str) -> None:
        self.call(74, struct.pack("<I", ROOT) + text(old) + struct.pack("<I", ROOT) + text(new))

    def unlink(self, name: str, flags: int = 0) -> None:
        self.call(76, struct.pack("<I", ROOT) + text(name) + struct.pack("<I", flags))

    def truncate(self, fid: int, size: int) -> None:
        self.call(26, struct.pack("<IIIIIQQQQQ", fid, 8, 0, 0, 0, size, 0, 0, 0, 0))

    def owner(self, fid: int) -> tuple[int, int]:
        """Numeric user and group."""
        answer = self.call(24, struct.pack("<IQ", fid, 0x7FF))
        uid, gid = struct.unpack_from("<II", answer, 8 + 13 + 4)
        return uid, gid

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionResetError("the server hung up")
            data += piece
        return data


def text(value: str | bytes) -> bytes:
    data: Any = value.encode() if isinstance(value, str) else value
    return struct.pack("<H", len(data)) + data
