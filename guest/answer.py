"""What an operation comes to: an answer, or a refusal with a sentence."""

from __future__ import annotations

from collections.abc import Callable


class Answer:
    """The fields and the payload of a positive response."""

    def __init__(
        self,
        fields: dict[str, object] | None = None,
        payload: bytes = b"",
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        """`afterwards` is called once the caller has had the answer."""
        self.fields, self.payload, self.afterwards = fields or {}, payload, afterwards


class Refused(Exception):
    """The request cannot be fulfilled; the text is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
