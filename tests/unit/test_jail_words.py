"""A program's standard error, which nobody reads while it runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from sandbox_kernel.jail.words import Words

FLOOD = """
import os
lost = 0
for _ in range(5000):
    try:
        os.write(2, b"complaint " * 100 + b"\\n")
    except BlockingIOError:
        lost += 1
print(lost)
"""


@pytest.fixture
def words() -> Iterator[Words]:
    made = Words()
    yield made
    made.close()


def test_what_was_said_is_told_once_on_one_line(words: Words) -> None:
    assert words.take() == ""
    subprocess.run(["sh", "-c", "echo one >&2; echo two >&2"], stderr=words.end, check=True)
    words.begun()
    assert words.take() == "one | two"
    assert words.take() == ""


def test_what_no_terminal_should_see_is_left_out(words: Words) -> None:
    subprocess.run(["printf", "\\033[2J\\nplain\\n"], stdout=words.end, check=True)
    assert words.take() == "plain"


def test_a_program_that_complains_without_end_goes_on(words: Words) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FLOOD], stderr=words.end, stdout=subprocess.PIPE, timeout=60, check=True
    )
    assert int(ran.stdout) > 0
    assert words.take().startswith("complaint ")
