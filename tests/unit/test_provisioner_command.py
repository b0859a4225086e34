"""Which command runs in the guest."""

from __future__ import annotations

import pytest

from sandbox_kernel.provisioner.command import IPYKERNEL, guest_argv

FILE = "/run/user/1000/jupyter/kernel-1.json"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/v/bin/python", "-m", "sandbox_kernel.launch", "-f", FILE], IPYKERNEL),
        (
            ["/v/bin/python", "-m", "sandbox_kernel.launch", "-f", FILE, "--kernelspec", "x", "--debug"],
            (*IPYKERNEL, "--debug"),
        ),
        (
            ["python", "-m", "sandbox_kernel.launch", "-f", FILE, "--", "R", "-f", FILE],
            ("R", "-f", "{connection_file}"),
        ),
        (["/v/bin/python3.11", "-m", "ipykernel_launcher", "-f", FILE], IPYKERNEL),
        (["/usr/bin/ark", "--file", FILE], ("/usr/bin/ark", "--file", "{connection_file}")),
        (["/opt/pythonish", FILE], ("/opt/pythonish", "{connection_file}")),
    ],
)
def test_the_hosts_words_become_the_guests(argv: list[str], expected: tuple[str, ...]) -> None:
    assert guest_argv(argv, FILE) == expected
