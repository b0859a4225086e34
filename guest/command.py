"""Which command a kernel's argv means in this guest. Pure.

`python… [options] -m ipykernel_launcher …` (or `-m ipykernel`) goes through the launcher, which gives
ipykernel the vsock sockets; a Python of any name is the guest's; everything else is as it was asked for.
"""

from __future__ import annotations

import os
import re

_PYTHON = re.compile(r"python[0-9.]*")
_KERNELS = ("ipykernel_launcher", "ipykernel")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
"""Python's options that take the next word (python(1))."""


def command(argv: list[str], connection_file: str, python: str, launcher: str) -> list[str]:
    """The command to execute.

    Args:
        argv: the kernel's command, at least one word; `{connection_file}` stands for the file.
        connection_file: its path in the guest.
        python: path of the guest's Python.
        launcher: path of the program that starts an ipykernel.
    """
    words = [word.replace("{connection_file}", connection_file) for word in argv]
    if not _PYTHON.fullmatch(os.path.basename(words[0])):
        return words
    words[0] = python
    at = _module(words)
    if at is not None and words[at + 1] in _KERNELS:
        return [*words[:at], launcher, *words[at + 1 :]]
    return words


def _module(words: list[str]) -> int | None:
    """Where Python finds its own `-m` with a module behind it; None when it would run something else."""
    at = 1
    while at < len(words) - 1:
        word = words[at]
        if word == "-m":
            return at
        if not word.startswith("-") or word in ("-", "--") or word.startswith("-c"):
            return None
        at += 2 if word in _WITH_VALUE else 1
    return None
