"""Fields of a request, checked: the right type, within bounds, or a ValueError that names the field.

Requests come from the host, which is not hostile but may be mistaken: a wrong field gets an answer, never a
half-done operation. Pure.
"""

from __future__ import annotations

Request = dict[str, object]


def integer(request: Request, name: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number from `low` to `high`; `default` when it is left out."""
    value = request.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is a number from {low} to {high}")
    return value


def seconds(request: Request, name: str, high: float, default: float) -> float:
    """A time above 0 and at most `high`."""
    value = request.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= high:
        raise ValueError(f"{name} is a time in seconds, above 0 and at most {high:g}")
    return float(value)


def mapping(request: Request, name: str, default: Request | None = None) -> Request:
    """An object; `default` when it is left out."""
    value = request.get(name, default)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is an object")
    return value


def text(request: Request, name: str, limit: int, default: str | None = None) -> str:
    """A text of 1 to `limit` characters without NUL, which no system call takes."""
    value = request.get(name, default)
    if not isinstance(value, str) or not 0 < len(value) <= limit or not _passable(value):
        raise ValueError(f"{name} is a text of 1 to {limit} characters")
    return value


def words(request: Request, name: str) -> list[str]:
    """A command: at least one word, the first not empty."""
    value = request.get(name)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(word, str) and _passable(word) for word in value)
        or not value[0]
    ):
        raise ValueError(f"{name} is a list of texts, the first of them a program's name")
    return value


def texts(request: Request, name: str, limit: int) -> list[str]:
    """Texts of 1 to `limit` characters; none when it is left out."""
    value = request.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name} is a list of texts")
    return [text({name: item}, name, limit) for item in value]


def variables(request: Request, name: str) -> dict[str, str]:
    """An environment: names without `=`."""
    value = request.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{name} is an object from names to texts")
    for key, content in value.items():
        if not key or "=" in key or not _passable(key):
            raise ValueError(f"{name} has a variable named {key[:80]!r}, which is no name")
        if not isinstance(content, str) or not _passable(content):
            raise ValueError(f"{name} has a variable {key[:80]!r} whose value is no text")
    return value


def _passable(value: str) -> bool:
    """Whether a system call can take it: no NUL, no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
