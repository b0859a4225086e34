"""When a pool starts VMs and when it ends them. Pure: the service tells what is, and does what this says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUIET = 1.0
"""Seconds after a VM was taken before its successor is started: the new kernel's first cells come first."""
_FIRST_GUESS = 160.0
"""MiB that a waiting VM is taken to need before one of its kind has been measured."""
_LEFT_FREE = 0.1
"""Part of the machine's RAM that shall stay available."""
_PRESSURE = 10.0
"""Per cent of time in which somebody waited for memory (PSI, some avg10) from which on the pool backs off."""
_BACK_OFF = 2.0
_LONGEST_BACK_OFF = 300.0


@dataclass(frozen=True)
class Host:
    """The machine's memory.

    Attributes:
        total: MiB of RAM.
        available: MiB that programs can have (proc(5), MemAvailable).
        pressure: `some avg10` of /proc/pressure/memory in per cent; 0 where Linux does not tell.
    """

    total: float
    available: float
    pressure: float = 0.0


@dataclass(frozen=True)
class Waiting:
    """A VM of the pool.

    Attributes:
        id: its id.
        kind: the kernelspec it is for.
        ready: False while it is being prepared.
        age: seconds since it was started.
        memory: MiB that it has for itself; 0 when it has not been measured.
        stale: its image is not any more the one that the kernelspec names.
    """

    id: str
    kind: str
    ready: bool
    age: float
    memory: float = 0.0
    stale: bool = False


@dataclass(frozen=True)
class Rules:
    """What the user wants.

    Attributes:
        sizes: VMs to keep waiting, by kernelspec.
        memory: MiB that all of them together may have.
        max_age: seconds after which a waiting VM is replaced.
    """

    sizes: Mapping[str, int]
    memory: float
    max_age: float


@dataclass(frozen=True)
class Decision:
    """What is to be done now.

    Attributes:
        start: the kernelspec that a VM is to be started for; None for none.
        end: VMs to be ended, by id, with the reason.
        why_not: why fewer VMs are kept than wanted, as a sentence; empty when as many are, or will be.
    """

    start: str | None
    end: Mapping[str, str]
    why_not: str = ""


def decide(
    rules: Rules, pool: Sequence[Waiting], host: Host, since_taken: float, since_failure: float, failures: int
) -> Decision:
    """Decides.

    Args:
        rules: what the user wants.
        pool: the VMs there are.
        host: its memory.
        since_taken: seconds since a VM was taken last.
        since_failure: seconds since a VM that was being prepared has failed.
        failures: how many have failed in a row.
    """
    end = _to_end(rules, pool, host)
    kept = [vm for vm in pool if vm.id not in end]
    missing = {kind: size - sum(vm.kind == kind for vm in kept) for kind, size in rules.sizes.items()}
    kind = max(missing, key=lambda each: missing[each], default=None)
    if kind is None or missing[kind] <= 0:
        return Decision(None, end)
    why_not = _why_not(rules, kept, host, _expected(kind, pool))
    wait = min(_BACK_OFF**failures, _LONGEST_BACK_OFF) if failures else 0.0
    if failures and since_failure < wait:
        why_not = (
            why_not or f"the last {failures} failed; the next one is tried in {wait - since_failure:.0f} s"
        )
    busy = any(not vm.ready for vm in kept)
    if why_not or busy or since_taken < QUIET:
        return Decision(None, end, why_not)
    return Decision(kind, end)


def _to_end(rules: Rules, pool: Sequence[Waiting], host: Host) -> dict[str, str]:
    """Those that are of no use, and under pressure the oldest other one."""
    end: dict[str, str] = {}
    for kind in {vm.kind for vm in pool}:
        ready = sorted((vm for vm in pool if vm.kind == kind and vm.ready), key=lambda vm: vm.age)
        for place, vm in enumerate(ready):
            if vm.stale:
                end[vm.id] = "its image has been replaced"
            elif vm.age > rules.max_age:
                end[vm.id] = f"it is older than {rules.max_age:g} s"
            elif place >= rules.sizes.get(kind, 0):
                end[vm.id] = "there are more than wanted"
    rest = [vm for vm in pool if vm.ready and vm.id not in end]
    over = sum(vm.memory for vm in rest) > rules.memory
    if rest and (over or _pressed(host, 0.0)):
        oldest = max(rest, key=lambda vm: vm.age)
        end[oldest.id] = "the pool is over its memory ceiling" if over else "memory is short on this machine"
    return end


def _why_not(rules: Rules, kept: Sequence[Waiting], host: Host, expected: float) -> str:
    used = sum(vm.memory for vm in kept)
    if used + expected > rules.memory:
        return f"one more would need {used + expected:.0f} MiB and the ceiling is {rules.memory:.0f} MiB"
    return _pressed(host, expected)


def _pressed(host: Host, expected: float) -> str:
    """Why the machine has no memory to spare; empty when it has."""
    if host.available - expected < host.total * _LEFT_FREE:
        return f"only {host.available:.0f} of {host.total:.0f} MiB are available on this machine"
    if host.pressure > _PRESSURE:
        return f"programs wait for memory {host.pressure:.0f} % of the time"
    return ""


def _expected(kind: str, pool: Sequence[Waiting]) -> float:
    return max((vm.memory for vm in pool if vm.kind == kind and vm.memory), default=_FIRST_GUESS)
