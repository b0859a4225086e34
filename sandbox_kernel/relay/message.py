"""Jupyter's messages on the wire: taken apart, signed, put together.

Theory of operation (Jupyter messaging protocol 5.4, "The Wire Protocol"). A message is a list of frames:

    identities…, <IDS|MSG>, signature, header, parent_header, metadata, content, buffers…

The signature is the hexadecimal HMAC, with the connection file's key, over the four frames that follow it;
with an empty key it is empty. Identities are routing and not signed; on iopub they are topics.

Frames here may come from a hostile guest. `find_delimiter` says whether they have a message's shape at all;
everything that looks into JSON bounds its size first and answers None for what is not what it should be.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.relay.zmtp import Frame

DELIMITER: Final = b"<IDS|MSG>"
PROTOCOL: Final = "5.4"

_AFTER_DELIMITER: Final = 5
_PARENT: Final = 3
_HEADER_BYTES: Final = 16 * 1024


class Signer:
    """Signs with the session's key."""

    def __init__(self, key: bytes, scheme: str) -> None:
        """Prepare a key.

        Raises:
            ConfigurationError: the scheme is not `hmac-` and a hash that Python knows.
        """
        digest = scheme.removeprefix("hmac-")
        if not scheme.startswith("hmac-") or digest not in hashlib.algorithms_available:
            raise ConfigurationError(
                f"The signature scheme {scheme!r} is not known; use 'hmac-sha256', Jupyter's default."
            )
        self._hmac = hmac.new(key, digestmod=digest) if key else None

    def sign(self, parts: Iterable[Frame]) -> bytes:
        """The signature of header, parent header, metadata and content."""
        if self._hmac is None:
            return b""
        code = self._hmac.copy()
        for part in parts:
            code.update(part)
        return code.hexdigest().encode()

    def verifies(self, signature: Frame, parts: Iterable[Frame]) -> bool:
        """Whether `signature` is that of `parts`."""
        return self._hmac is None or hmac.compare_digest(self.sign(parts), bytes(signature))


@dataclass(frozen=True)
class Author:
    """Writes messages of its own into a session: the relay's, where the kernel cannot speak."""

    signer: Signer
    session: str = field(default_factory=lambda: str(uuid.uuid4()))

    def topic(self, kind: str) -> bytes:
        """What stands before a message of this type on iopub."""
        return f"kernel.{self.session}.{kind}".encode()

    def message(
        self, kind: str, content: Mapping[str, Any], parent: bytes = b"{}", metadata: bytes = b"{}"
    ) -> list[Frame]:
        """A signed message from the delimiter on; `parent` is the header it answers, byte for byte."""
        header = {
            "msg_id": str(uuid.uuid4()),
            "msg_type": kind,
            "username": "sandbox-kernel",
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": PROTOCOL,
        }
        parts = [json.dumps(header).encode(), parent, metadata, json.dumps(content).encode()]
        return [DELIMITER, self.signer.sign(parts), *parts]


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it must be known to answer it.

    Attributes:
        channel: shell or control.
        identities: where the answer goes.
        header: the request's header, byte for byte; the answer's parent.
        id: its message id.
        kind: its message type, `…_request`.
        subshell: which of the kernel's shells it is for (JEP 91); empty for the main one.
    """

    channel: str
    identities: tuple[bytes, ...]
    header: bytes
    id: str
    kind: str
    subshell: str = ""


def find_delimiter(frames: Sequence[Frame], identities: int) -> int | None:
    """Index of a well-shaped message's delimiter, with at most `identities` before it; else None."""
    for index, frame in enumerate(frames[: identities + 1]):
        if frame == DELIMITER:
            return index if len(frames) - index > _AFTER_DELIMITER else None
    return None


def find_beginning(frames: Sequence[Frame], identities: int) -> int | None:
    """Index of the delimiter in a message's beginning, which has its header and its parent's at least."""
    for index, frame in enumerate(frames[: identities + 1]):
        if frame == DELIMITER:
            return index if len(frames) - index > _PARENT else None
    return None


def read_kind(frames: Sequence[Frame], delimiter: int) -> str:
    """A message's type; empty when it says none."""
    kind = _read_json(frames[delimiter + 2]).get("msg_type")
    return kind if isinstance(kind, str) else ""


def read_request(channel: str, frames: Sequence[bytes], signer: Signer, identities: int) -> Request | None:
    """The request in a client's message; None when it is no signed request that a kernel would answer."""
    at = find_delimiter(frames, identities)
    if at is None or len(frames[at + 2]) > _HEADER_BYTES:
        return None
    header = _read_json(frames[at + 2])
    message_id, kind = header.get("msg_id"), header.get("msg_type")
    if not isinstance(message_id, str) or not isinstance(kind, str) or not kind.endswith("_request"):
        return None
    if not signer.verifies(frames[at + 1], frames[at + 2 : at + 6]):
        return None
    subshell = header.get("subshell_id")
    return Request(
        channel,
        tuple(frames[:at]),
        frames[at + 2],
        message_id,
        kind,
        subshell if isinstance(subshell, str) else "",
    )


def read_parent(frames: Sequence[Frame], delimiter: int) -> str | None:
    """The message id that a kernel's message gives as its parent's."""
    message_id = _read_json(frames[delimiter + 3]).get("msg_id")
    return message_id if isinstance(message_id, str) else None


def is_kind(frames: Sequence[Frame], delimiter: int, kind: bytes) -> bool:
    """Whether a kernel's message is of this type; reads the header only when it may be."""
    header = frames[delimiter + 2]
    return (
        isinstance(header, bytes) and kind in header and _read_json(header).get("msg_type") == kind.decode()
    )


def read_content(frames: Sequence[Frame], delimiter: int) -> dict[str, Any]:
    """A kernel's message's content; empty when it is not small JSON."""
    return _read_json(frames[delimiter + 5])


def _read_json(frame: Frame) -> dict[str, Any]:
    if not isinstance(frame, bytes):
        return {}
    try:
        value = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
