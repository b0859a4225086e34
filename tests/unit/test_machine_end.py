"""Which of a VM's troubles is the reason for the others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from sandbox_kernel.errors import GuestError, GuestProtocolError
from sandbox_kernel.machine import machine as module
from sandbox_kernel.machine.ignition import Ignition
from sandbox_kernel.machine.machine import Machine

KILLED = GuestError("QEMU was killed by signal 9.")
RESET = GuestError("The connection to the VM's agent broke.")


def new_machine() -> Machine:
    return Machine(cast(Ignition, SimpleNamespace(plan=None)))


async def test_the_end_of_qemu_explains_a_stream_that_broke_a_moment_before() -> None:
    machine = new_machine()
    asyncio.get_running_loop().call_later(0.01, machine.ended.set_result, KILLED)
    assert await machine.cause_of(RESET) is KILLED


async def test_a_stream_that_breaks_in_a_living_vm_is_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEEN", 0.01)
    assert await new_machine().cause_of(RESET) is RESET


async def test_a_broken_protocol_needs_no_other_reason() -> None:
    machine = new_machine()
    machine.ended.set_result(KILLED)
    broken = GuestProtocolError("The VM's agent broke its protocol.")
    assert await machine.cause_of(broken) is broken
