"""What a case is: a notebook cell, the limit it attacks, and what must be seen.

How a cell ends is one of four ways, and each must be what the case says:

    error       by itself, with this exception; the kernel goes on
    interrupt   not by itself; an interrupt ends it and the kernel goes on
    death       with its kernel, and an `error` of this name
    output      by itself, with this in its output; the kernel goes on

However it ends, a neighbour's kernel must have been as good as undisturbed meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        name: what is done.
        limit: what it attacks.
        cell: the code.
        ends: `error`, `interrupt`, `death` or `output`.
        seen: regular expression for the exception, the death's name, or the output.
        config: the VM's.
        lasts: seconds that the attack goes on before it is interrupted.
        stdin: whether the client says that it can answer `input()`; it does not.
    """

    name: str
    limit: str
    cell: str
    ends: str
    seen: str
    config: Mapping[str, Any] = field(default_factory=dict)
    lasts: float = 3.0
    stdin: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: the case.
        start: how the VM came to be.
        seen: what a person saw, on one line.
        control: seconds from the interrupt to the cell's end; from the cell's begin to it where nobody
            interrupted.
        quiet, meanwhile: seconds; p99 of the neighbour's `1+1` before and during the attack.
    """

    case: Case
    start: str
    seen: str
    control: float
    quiet: float
    meanwhile: float
