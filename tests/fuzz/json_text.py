"""JSON as a script wants it: the names that matter, values of every type, and what is nearly JSON.

The text is written by hand, not by `json.dumps`: it has names twice, numbers that no double holds, halves of
surrogate pairs, nesting without end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tests.fuzz.script import Script

_MOST_FIELDS = 12
_DEEPEST = 3
_WORDS = (
    b"null",
    b"true",
    b"false",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0.0",
    b"9007199254740993",
    b"1" * 5000,
    b"1" * 4300,
    b'"\\ud800"',
    b'"start"',
    b'"\\u0000"',
    b'"\\u202e\\u0007\\n"',
    b"{}",
    b"[]",
    b"[" * 1500,
    b"[" * 400 + b"]" * 400,
    b"",
)
KINDS = 8


def an_object(script: Script, names: Sequence[str], depth: int = 0) -> bytes:
    """An object of some fields, most of them with names from `names`."""
    fields = [_field(script, names, depth) for _ in range(script.below(_MOST_FIELDS))]
    return b"{" + b",".join(fields) + b"}"


def nearly(script: Script, names: Sequence[str], good: Mapping[str, object]) -> bytes:
    """A good object, but for the values of some of its fields, or with some more."""
    fields = [json.dumps(name).encode() + b":" + json.dumps(value).encode() for name, value in good.items()]
    for _ in range(script.below(4)):
        if fields and script.below(8):
            at = script.below(len(fields))
            fields[at] = fields[at].partition(b":")[0] + b":" + _value(script, names, 0)
        else:
            fields.append(_field(script, names, 0))
    return b"{" + b",".join(fields) + b"}"


def _field(script: Script, names: Sequence[str], depth: int) -> bytes:
    at = script.number()
    name = json.dumps(names[at % len(names)]).encode() if at < 248 else _text(script)
    return name + b":" + _value(script, names, depth)


def _value(script: Script, names: Sequence[str], depth: int) -> bytes:
    kind = script.below(KINDS)
    if kind == 0:
        return script.choose(_WORDS)
    if kind == 1:
        return b"%d" % script.number()
    if kind == 2:
        return b"-%d" % script.number()
    if kind == 3:
        return b"%d.%d" % (script.number(), script.number())
    if kind == 4:
        return _text(script)
    if kind == 5:
        return json.dumps(script.string().decode("latin-1") * script.below(100)).encode()
    if depth >= _DEEPEST:
        return b"null"
    if kind == 6:
        return an_object(script, names, depth + 1)
    return b"[" + b",".join(_value(script, names, depth + 1) for _ in range(script.below(5))) + b"]"


def _text(script: Script) -> bytes:
    return json.dumps(script.string().decode("utf-8", "surrogateescape")).encode()
