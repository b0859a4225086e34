"""When a pool starts and ends VMs."""

from __future__ import annotations

import dataclasses

import pytest

from sandbox_kernel.pool.policy import QUIET, Decision, Host, Rules, Waiting, decide

ROOMY = Host(total=16000, available=12000)
RULES = Rules({"a": 2, "b": 1}, memory=1000, max_age=600)
LONG = 1e6


def vm(name: str, kind: str = "a", ready: bool = True, age: float = 10.0, **more: object) -> Waiting:
    return dataclasses.replace(Waiting(name, kind, ready, age, memory=100.0), **more)  # type: ignore[arg-type]


def ask(
    *pool: Waiting,
    rules: Rules = RULES,
    host: Host = ROOMY,
    since_taken: float = LONG,
    since_failure: float = LONG,
    failures: int = 0,
) -> Decision:
    return decide(rules, pool, host, since_taken, since_failure, failures)


def test_an_empty_pool_begins_with_the_kind_that_lacks_most() -> None:
    assert ask() == Decision("a", {})


def test_a_full_pool_is_left_alone() -> None:
    assert ask(vm("1"), vm("2"), vm("3", "b")) == Decision(None, {})


def test_one_vm_is_prepared_at_a_time() -> None:
    assert ask(vm("1", ready=False)).start is None


def test_a_new_kernels_first_cells_come_before_its_successor() -> None:
    assert ask(vm("1"), vm("3", "b"), since_taken=QUIET / 2).start is None
    assert ask(vm("1"), vm("3", "b"), since_taken=QUIET * 2).start == "a"


def test_what_is_old_stale_or_too_many_ends_with_the_reason() -> None:
    decision = ask(
        vm("old", age=601), vm("stale", stale=True), vm("1"), vm("2", age=5), vm("3", age=2), vm("x", "gone")
    )
    assert set(decision.end) == {"old", "stale", "1", "x"}
    assert decision.end["old"] == "it is older than 600 s"
    assert decision.end["stale"] == "its image has been replaced"
    assert decision.end["1"] == decision.end["x"] == "there are more than wanted"


def test_the_ceiling_keeps_the_pool_smaller_and_says_so() -> None:
    decision = ask(vm("1", memory=950), vm("3", "b", memory=10))
    assert decision.start is None
    assert decision.why_not == "one more would need 1910 MiB and the ceiling is 1000 MiB"


def test_a_pool_that_has_grown_over_its_ceiling_ends_its_oldest() -> None:
    decision = ask(vm("1", memory=600, age=20), vm("2", memory=600, age=30), vm("3", "b", age=25))
    assert decision.end == {"2": "the pool is over its memory ceiling"}


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (Host(16000, 1650), "only 1650 of 16000 MiB are available on this machine"),
        (Host(16000, 9000, 30.0), "programs wait for memory 30 % of the time"),
    ],
)
def test_short_memory_stops_the_refill(host: Host, reason: str) -> None:
    decision = ask(vm("1"), host=host)
    assert (decision.start, decision.why_not) == (None, reason)


def test_pressure_ends_one_vm_at_a_time() -> None:
    decision = ask(vm("1", age=1), vm("2", age=2), vm("3", "b", age=3), host=Host(16000, 100))
    assert decision.end == {"3": "memory is short on this machine"}


def test_failures_are_retried_later_and_later() -> None:
    assert ask(failures=1, since_failure=1.0).start is None
    assert ask(failures=1, since_failure=2.1).start == "a"
    assert ask(failures=5, since_failure=20.0).why_not == "the last 5 failed; the next one is tried in 12 s"
    assert ask(failures=50, since_failure=301.0).start == "a"


def test_nothing_wanted_nothing_kept() -> None:
    assert ask(rules=Rules({}, 1000, 600)) == Decision(None, {})
