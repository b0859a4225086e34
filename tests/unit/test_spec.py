"""What may be configured, by whom, and what is said about the rest."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sandbox_kernel import policy
from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.spec import KEYS, VMSpec, forwarded, from_environment, resolve

RULES = "a list of network rules such as pypi.org, *.pypi.org:443 or 10.1.0.0/16:5432/tcp"


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
        ("network", "open", "one of none, allowlist, public, full"),
        ("network_allow", "x.org", RULES),
        ("network_allow", ["x.org y.org"], RULES),
        ("network_deny", [""], RULES),
        ("network_deny", ["x.org"] * 65, RULES),
        ("network_bandwidth", -1, "a number from 0.001 to 1048576 MiB/s or 0 (no limit)"),
        ("network_connections", 0, "a whole number from 1 to 65536"),
        ("host_services", ["http"], "a list of TCP ports of this host, as PORT or GUEST:HOST"),
        ("host_services", ["80"] * 17, "a list of TCP ports of this host, as PORT or GUEST:HOST"),
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


NETWORK = {
    "network": "public",
    "network_allow": ["pypi.org:443"],
    "network_deny": ["10.0.0.0/8"],
    "network_bandwidth": 2,
    "network_connections": 9,
    "host_services": ["80:8080"],
}


def test_a_network_is_a_policy() -> None:
    spec = resolve([("kernel.json", NETWORK)])
    assert spec.policy == policy.policy("public", ["pypi.org:443"], ["10.0.0.0/8"], ["80:8080"], 9, 2.0)
    assert VMSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    assert resolve([]).policy == policy.Policy()


def test_the_environment_configures_a_network() -> None:
    environ = {"SANDBOX_KERNEL_NETWORK": "allowlist", "SANDBOX_KERNEL_NETWORK_ALLOW": "x.org *.y.org:443"}
    found = from_environment(environ)
    assert found == {"network": "allowlist", "network_allow": ["x.org", "*.y.org:443"]}
    assert from_environment({"SANDBOX_KERNEL_MAX_NETWORK": "none"}, ["max_network"]) == {
        "max_network": "none"
    }


@pytest.mark.parametrize("cap", policy.MODES)
@pytest.mark.parametrize("mode", policy.MODES)
def test_a_cap_of_the_network_binds_from_none_over_allowlist_and_public_to_full(mode: str, cap: str) -> None:
    order = ("none", "allowlist", "public", "full")
    if order.index(mode) <= order.index(cap):
        assert resolve([("kernel.json", {"network": mode})], {"max_network": cap}).network == mode
        return
    with pytest.raises(ConfigurationError) as caught:
        resolve([("kernel.json", {"network": mode})], {"max_network": cap})
    assert str(caught.value).startswith(
        f"kernel.json sets network to {mode}, over the administrator's limit max_network = {cap}; "
    )


def test_a_cap_of_the_network_is_one_of_its_choices() -> None:
    with pytest.raises(ConfigurationError, match="max_network is 'some'; allowed is one of none, allowlist"):
        resolve([], {"max_network": "some"})


def test_a_cap_of_bandwidth_makes_it_a_limit() -> None:
    assert resolve([], {"max_network_bandwidth": 3.0}).network_bandwidth == 3.0
    assert resolve([], {"max_network_connections": 3}).network_connections == 3


def test_a_vm_has_a_network_device_or_none_and_its_rules_come_later() -> None:
    plain = resolve([])
    shapes = {resolve([("k", NETWORK | {"network": mode})]).shape for mode in ("allowlist", "public", "full")}
    [shape] = shapes
    assert (shape.network, shape.network_allow, shape.network_connections) == ("full", (), 256)
    assert shape.network_bandwidth == 0
    assert shape != plain.shape
    # The uplink is another one where something of the host is to be reached.
    assert shape.host_services == ("80:8080",)
