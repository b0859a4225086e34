"""What of a process becomes immortal before a template is saved."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import immortal

GUEST = Path(immortal.__file__).parent
PROGRAM = """
import sys
import immortal

class Kept:
    def method(self):
        return "a constant of it"

held = Kept()
before = sys.getrefcount(held)
done = immortal.immortalise()
print(done, immortal.count_of_immortals() is not None, sys.getrefcount(held) == before,
      *(sys.getrefcount(each) == sys.getrefcount(None) for each in (Kept, Kept.method, sys)), held.method())
"""


def of_programs(*objects: object) -> list[int]:
    return [id(each) for each in immortal._of_programs(objects)]


def test_functions_go_with_their_code_and_constants() -> None:
    def function() -> str:
        return "a constant that only this function has"

    found = of_programs(function)
    assert {id(function), id(function.__code__), id(function.__code__.co_consts)} <= set(found)
    assert id(function()) in found


def test_classes_and_modules_go_with_what_of_a_program_they_hold_and_nothing_else() -> None:
    class Class:
        constant = "of the class"
        resource = object()

        def method(self) -> None: ...

    module = types.ModuleType("module")
    module.called, module.data, module.one = len, ["data"], Class()  # type: ignore[attr-defined]
    found = set(of_programs(Class, module))
    assert {id(Class), id(Class.constant), id(vars(Class)["method"]), id(module), id(len)} <= found
    assert not {id(Class.resource), id(module.data), id(module.one)} & found


def test_what_may_hold_a_resource_stays_mortal() -> None:
    with Path(__file__).open() as file:
        assert of_programs(file, [file], {"file": file}, (x for x in "abc")) == []


def test_a_program_runs_on_when_it_has_become_immortal_or_cannot() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(GUEST)}, capture_output=True, text=True
    )
    number, possible, untouched, *others = done.stdout.split(" ", 6)
    assert (int(number) > 1000) == (possible == "True") == (sys.version_info >= (3, 12)), done.stderr
    assert untouched == "True"
    assert others == [possible] * 3 + ["a constant of it\n"]
