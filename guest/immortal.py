"""Makes what a template's programs consist of immortal, so that running it does not write to it.

Python counts references in the objects themselves: to call a function is to write to the page it lies on,
which a clone then has for itself. Since 3.12 an object can be immortal (PEP 683): its count is never written
again. Python makes only some of its own objects so, and has no function for others; the count of `None` shows
what to put there.

Rules. Only what a program consists of and what has no finaliser of its own becomes immortal: functions, code,
constants, classes, modules. Nothing that holds a resource, and nothing of a user's: no user code has run yet.
Where counts are not what this file takes them for, nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Iterable

_LEAST = 1 << 30
"""Counts from here on are no counts (3.12 and 3.13)."""
_PROGRAM = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ModuleType,
    types.CellType,
    property,
    staticmethod,
    classmethod,
)
_CONSTANTS = (str, bytes, int, float, complex, tuple, frozenset, types.CodeType)


def count_of_immortals() -> int | None:
    """What stands in place of an immortal object's count, in the lower 32 bits; None where there are none."""
    count = ctypes.c_uint64.from_address(id(None)).value
    return count if count == sys.getrefcount(None) and _LEAST <= count < 1 << 32 else None


def immortalise() -> int:
    """Makes the programs in this process immortal; how many objects have become it."""
    count = count_of_immortals()
    if count is None:
        return 0
    done = 0
    for each in _of_programs(gc.get_objects()):
        word = ctypes.c_uint32.from_address(id(each))
        if word.value < _LEAST:
            word.value = count
            done += 1
    return done


def _of_programs(objects: Iterable[object]) -> Iterable[object]:
    """What of `objects` is a program's, with the code and the constants of its functions."""
    for each in objects:
        if type(each) in _PROGRAM or isinstance(each, type):
            yield each
        if isinstance(each, type) or type(each) is types.ModuleType:
            yield from filter(_is_program, vars(each).values())
        if type(each) is types.FunctionType:
            yield from _constants((each.__code__, each.__defaults__, each.__closure__, each.__name__))


def _is_program(value: object) -> bool:
    return type(value) in _PROGRAM or type(value) in _CONSTANTS or isinstance(value, type)


def _constants(values: Iterable[object]) -> Iterable[object]:
    for value in values:
        if type(value) in _CONSTANTS:
            yield value
        if type(value) is tuple:
            yield from _constants(value)
        elif isinstance(value, types.CodeType):
            yield from _constants((value.co_consts, value.co_names, value.co_name, value.co_filename))
