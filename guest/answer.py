"""What an operation comes to: an answer, or a refusal with a sentence."""

from __future__ import annotations

import socket
from collections.abc import Callable


class Copy:
    """What takes a connection over, once that has been granted."""

    def run(self, connection: socket.socket) -> None:
        """Uses the connection, until it is of no more use."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of everything else; called once, whether it has run or not."""
        raise NotImplementedError


class Answer:
    """The fields and the payload of a positive response."""

    def __init__(
        self,
        fields: dict[str, object] | None = None,
        payload: bytes = b"",
        afterwards: Callable[[], None] | None = None,
        copy: Copy | None = None,
    ) -> None:
        """`afterwards` is called once the caller has had the answer; `copy` has the connection then."""
        self.fields, self.payload, self.afterwards = fields or {}, payload, afterwards
        self.copy = copy


class Refused(Exception):
    """The request cannot be fulfilled; the text is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
