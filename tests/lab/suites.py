"""What runs in the lab, as commands of the user there. `{results}` is what comes out."""

from __future__ import annotations

from dataclasses import dataclass

SETUP = "sandbox-kernel setup"
"""Probes KVM, makes a template, installs the kernelspec."""

_SMOKE = "tests/lab/test_kvm.py tests/lab/test_cgroup.py"
_NETWORK = "tests/lab/test_network.py"
_PYTEST = "python3 -m pytest -p no:cacheprovider --junitxml=$RESULTS/junit.xml"
_VM = (
    "kernel",
    "template",
    "nursery",
    "cleanup",
    "isolation",
    "clients",
    "errors",
    "pool",
    "vsock_device",
    "cycles",
    "disk",
    "mounts",
    "volumes",
    "expose",
    "copy",
)
"""Of tests/vm: all but what needs the internet (building images, the README's commands)."""
_CONFORMANCE = "python3 -m tests.conformance --quick --python /usr/bin/python3 --output $RESULTS/conformance"
_MEASURES = "--only start --only round-trip --only stdout-lines --only stdout-blocks --only memory-at-ready"


@dataclass(frozen=True)
class Suite:
    """One command.

    Attributes:
        purpose: what it is for, a few words.
        command: for the shell.
        guests: images that it wants; see `guests`.
    """

    purpose: str
    command: str
    guests: tuple[str, ...] = ("default",)


SUITES = {
    "smoke": Suite("KVM and the kernel's vsock, from probe to restored kernels", f"{_PYTEST} {_SMOKE}"),
    "standard": Suite(
        "the smoke set, networks, the tests of VMs that need no internet, jupyter_kernel_test",
        f"{_PYTEST} {_SMOKE} {_NETWORK} {' '.join(f'tests/vm/test_{name}.py' for name in _VM)} ; "
        f"first=$? ; {_CONFORMANCE} && exit $first",
    ),
    "versions": Suite(
        "the guests of two Debians with the lab's QEMU",
        f"{_PYTEST} tests/lab/test_versions.py",
        ("default", "debian12"),
    ),
    "bench": Suite(
        "plain ipykernel and the micro-VM side by side",
        f"python3 -m bench --markdown --trace --json $RESULTS/bench.json {_MEASURES} && "
        "python3 -m bench.anatomy --json $RESULTS/anatomy.json",
    ),
    "shell": Suite("a shell on the console, for you", "exec bash -i"),
}


def command(suite: Suite) -> list[str]:
    """The words that run a suite."""
    return ["bash", "-c", f"{SETUP} && {{ {suite.command}; }}"]
