"""What a run reaches, counted for libFuzzer at a fifth of atheris' price.

atheris calls a function at each branch, which takes 200 ns, and so a run with it two to four times as long
as without. Here a branch adds one to a number in a list, in line; `hand_over` gives the numbers to libFuzzer
after the run, in counters as compiled code has them (SanitizerCoverage's 8-bit ones). The instructions are
those of CPython 3.11 to 3.13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import atheris
from atheris import instrument_bytecode

_COUNTS: list[int] = []
"""For each branch, how often the run has been there."""


def instrumenting(modules: Sequence[str], comparisons: bool) -> AbstractContextManager[Any]:
    """Counts in what is imported meanwhile; with `comparisons`, libFuzzer sees what is compared."""
    instrument_bytecode.Instrumentor._generate_trace_branch_invocation = _add_one
    hook = atheris.instrument_imports(include=modules)
    hook._trace_dataflow = comparisons
    return hook


def _add_one(instrumentor: Any, where: Any) -> list[Any]:
    """The instructions of `_COUNTS[number] += 1`."""
    number = len(_COUNTS)
    _COUNTS.append(0)
    counts, at, one = map(instrumentor._get_const, (_COUNTS, number, 1))
    words = (
        *(("LOAD_CONST", counts), ("LOAD_CONST", at), ("COPY", 2), ("COPY", 2), ("BINARY_SUBSCR", None)),
        *(("LOAD_CONST", one), ("BINARY_OP", 0), ("SWAP", 3), ("SWAP", 2), ("STORE_SUBSCR", None)),
    )
    return [instrument_bytecode._generate_instruction(word, argument, where) for word, argument in words]


class Counters:
    """libFuzzer's view of the counts: an array, and for each place in it something like an address."""

    def __init__(self) -> None:
        """To be made when all is imported, and the fuzzer is loaded."""
        from atheris import core_with_libfuzzer  # type: ignore[attr-defined]

        size = len(_COUNTS)
        self._array = (ctypes.c_uint8 * size)()
        self._view = memoryview(self._array).cast("B")
        self._nothing = [0] * size
        # An address and a flag each; both arrays are libFuzzer's for as long as it runs.
        self._places = (ctypes.c_size_t * (2 * size))(*(half for at in range(size) for half in (at + 1, 0)))
        fuzzer = ctypes.CDLL(core_with_libfuzzer.__file__)
        for name, array in (("8bit_counters", self._array), ("pcs", self._places)):
            begin = ctypes.addressof(array)
            end = begin + ctypes.sizeof(array)
            getattr(fuzzer, f"__sanitizer_cov_{name}_init")(ctypes.c_void_p(begin), ctypes.c_void_p(end))

    def hand_over(self) -> None:
        """Tells what the run has reached, and begins anew."""
        try:
            self._view[:] = bytes(_COUNTS)
        except ValueError:  # a number above 255
            self._view[:] = bytes([min(count, 255) for count in _COUNTS])
        _COUNTS[:] = self._nothing
