"""What may be configured, by whom, and what is said about the rest."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.spec import KEYS, VMSpec, forwarded, from_environment, resolve


def test_the_first_source_that_names_a_key_wins() -> None:
    spec = resolve([("kernel.json", {"memory": 700}), ("traitlets", {"memory": 800, "vcpus": 2})])
    assert (spec.memory, spec.vcpus, spec.image) == (700, 2, "default")


def test_none_is_not_set() -> None:
    assert resolve([("kernel.json", {"memory": None}), ("traitlets", {"memory": 800})]).memory == 800


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve([("kernel.json", {"memroy": 700})])
    assert str(caught.value) == (
        "kernel.json sets 'memroy', which is no key of a micro-VM; allowed are " + ", ".join(KEYS) + "."
    )


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("memory", 16, "a whole number from 192 to 1048576 MiB"),
        ("memory", "512", "a whole number from 192 to 1048576 MiB"),
        ("memory", True, "a whole number from 192 to 1048576 MiB"),
        ("memory", 512.5, "a whole number from 192 to 1048576 MiB"),
        ("vcpus", 0, "a whole number from 1 to 64"),
        ("accelerator", "hvf", "one of auto, kvm, tcg"),
        ("transport", "udp", "one of ipc, tcp"),
        ("boot_timeout", float("nan"), "a number from 1 to 3600 s"),
        ("image", "../secret", "an image's name or digest (letters, digits, `.`, `_`, `-`)"),
        ("env", ["A*B"], "a list of variable names, each with at most one `*`, at its end"),
        ("env", "HOME", "a list of variable names, each with at most one `*`, at its end"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve([("kernel.json", {key: value})])
    assert str(caught.value).startswith(f"kernel.json sets {key} to ")
    assert str(caught.value).endswith(f"; allowed is {allowed}.")


def test_a_cap_binds_what_a_kernelspec_asks_for() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve([("kernel.json", {"memory": 4096})], {"max_memory": 2048})
    assert str(caught.value) == (
        "kernel.json sets memory to 4096, over the administrator's limit max_memory = 2048; "
        "ask for 2048 or less."
    )


def test_a_cap_below_the_default_lowers_the_default() -> None:
    assert resolve([], {"max_memory": 512}).memory == 512


def test_a_cap_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_memory is 'lots'; allowed is a whole number"):
        resolve([], {"max_memory": "lots"})


def test_the_environment_configures_every_key() -> None:
    found = from_environment({"SANDBOX_KERNEL_MEMORY": "700", "SANDBOX_KERNEL_ENV": "A B_*", "MEMORY": "1"})
    assert found == {"memory": 700, "env": ["A", "B_*"]}


def test_text_in_the_environment_that_is_no_number_is_refused_like_any_value() -> None:
    with pytest.raises(ConfigurationError, match="the environment sets memory to 'big'"):
        resolve([("the environment", from_environment({"SANDBOX_KERNEL_MEMORY": "big"}))])


def test_a_spec_survives_json() -> None:
    spec = VMSpec(memory=512, env=("A", "B_*"), boot_timeout=3)
    assert VMSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_only_named_variables_reach_the_guest() -> None:
    host = {"HOME": "/root", "AWS_SECRET": "x", "LC_ALL": "C", "LC_TIME": "C", "MPLBACKEND": "agg"}
    assert forwarded(("LC_*",), host) == {"LC_ALL": "C", "LC_TIME": "C", "MPLBACKEND": "agg"}
    assert forwarded((), host) == {"MPLBACKEND": "agg"}


def test_a_shape_is_what_a_running_vm_cannot_change() -> None:
    one = VMSpec(memory=300, transport="tcp", env=("A",), boot_timeout=9.0, processes=99)
    assert one.shape == VMSpec(memory=300)
    assert one.shape != VMSpec(memory=301).shape
