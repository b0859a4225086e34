"""Which command a kernel's argv means in the guest."""

from __future__ import annotations

import pytest

from command import command


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            ["/py", "/launch", "ipykernel_launcher", "-f", "/c.json"],
        ),
        (
            ["/x/python3.11", "-X", "dev", "-m", "ipykernel", "-f", "{connection_file}"],
            ["/py", "-X", "dev", "/launch", "ipykernel", "-f", "/c.json"],
        ),
        (
            ["python", "-Xfrozen_modules=off", "-W", "-m", "-m", "ipykernel_launcher"],
            ["/py", "-Xfrozen_modules=off", "-W", "-m", "/launch", "ipykernel_launcher"],
        ),
        (["python3", "-m", "bash_kernel"], ["/py", "-m", "bash_kernel"]),
        (["python3", "-m"], ["/py", "-m"]),
        (["python3", "main.py", "-m", "ipykernel"], ["/py", "main.py", "-m", "ipykernel"]),
        (["python3", "-c", "1", "-m", "ipykernel"], ["/py", "-c", "1", "-m", "ipykernel"]),
        (["pythonic", "-m", "ipykernel"], ["pythonic", "-m", "ipykernel"]),
        (["ark", "--file={connection_file}"], ["ark", "--file=/c.json"]),
    ],
)
def test_an_ipykernel_is_started_through_the_launcher_and_nothing_else_is(
    argv: list[str], expected: list[str]
) -> None:
    assert command(argv, "/c.json", "/py", "/launch") == expected
