"""Framing on the vhost-user socket: bytes and file descriptors in, whole messages out.

Theory of operation. The socket is non-blocking. File descriptors travel with the first bytes of a message,
and a read never takes bytes of two messages, so that each descriptor belongs to the message whose header it
came with. What has arrived of a message waits here, bounded by `protocol.MAX_PAYLOAD` and
`protocol.MAX_FILES`.

Rule that this file keeps: a file descriptor that was received is in exactly one of these states: held here,
given away in a `Message`, or closed.
"""

from __future__ import annotations

import array
import os
import socket
from dataclasses import dataclass, field

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user import protocol

_FILES_SPACE = socket.CMSG_SPACE(protocol.MAX_FILES * array.array("i").itemsize)


@dataclass
class Message:
    """A whole request. Its receiver owns `files`: it takes those it keeps and calls `close`.

    Attributes:
        envelope: the header.
        payload: as many bytes as the header says.
        files: file descriptors that came along.
    """

    envelope: protocol.Envelope
    payload: bytes
    files: list[int] = field(default_factory=list)

    def take_file(self) -> int:
        """The first file descriptor, from now on the caller's.

        Raises:
            GuestProtocolError: there is none.
        """
        if not self.files:
            raise GuestProtocolError(f"vhost-user request {self.envelope.request.name} came without a file")
        return self.files.pop(0)

    def close(self) -> None:
        """Close the files that nobody took."""
        while self.files:
            os.close(self.files.pop())


class Channel:
    """One end of a vhost-user connection, as the back-end reads and writes it."""

    def __init__(self, sock: socket.socket) -> None:
        """Args: sock is a connected AF_UNIX stream socket, from now on the channel's."""
        sock.setblocking(False)
        self._sock = sock
        self._envelope: protocol.Envelope | None = None
        self._bytes = bytearray()
        self._files: list[int] = []
        self.ended = False
        """True once the front-end has closed its end."""

    def fileno(self) -> int:
        """The socket's, to wait for."""
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """The next message, None when it has not arrived completely or never will (`ended`).

        Raises:
            GuestProtocolError: what arrived is no message of the protocol.
        """
        while True:
            if self._envelope is None and len(self._bytes) == protocol.HEADER_SIZE:
                self._envelope = protocol.parse_header(bytes(self._bytes))
                self._bytes.clear()
            if self._envelope is not None and len(self._bytes) == self._envelope.size:
                message = Message(self._envelope, bytes(self._bytes), self._files)
                self._envelope, self._files = None, []
                self._bytes.clear()
                return message
            wanted = protocol.HEADER_SIZE if self._envelope is None else self._envelope.size
            if not self._read(wanted - len(self._bytes)):
                return None

    def send(self, reply: bytes) -> None:
        """Send a reply; nothing happens when the front-end is gone (`ended`).

        Raises:
            GuestProtocolError: the front-end does not read its replies.
        """
        try:
            sent = self._sock.send(reply)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.ended = True
            return
        if sent != len(reply):
            raise GuestProtocolError("the vhost-user front-end does not read its replies")

    def close(self) -> None:
        """Close the socket and every file that was held. Idempotent."""
        self._sock.close()
        while self._files:
            os.close(self._files.pop())

    def _read(self, count: int) -> bool:
        """Read at most `count` bytes of the message; False when there is nothing to read."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(count, _FILES_SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            self.ended = True
            return False
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                files = array.array("i")
                files.frombytes(content[: len(content) - len(content) % files.itemsize])
                self._files.extend(files)
        if flags & socket.MSG_CTRUNC or len(self._files) > protocol.MAX_FILES:
            raise GuestProtocolError(f"a vhost-user message has more than {protocol.MAX_FILES} files")
        if not data:
            self.ended = True
            return False
        self._bytes += data
        return True
