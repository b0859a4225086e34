"""Which command runs in the guest, given the one that a kernelspec names. Pure.

Three kinds of argv arrive:

    python -m sandbox_kernel.launch -f FILE …        our kernelspec: the guest's ipykernel
    python -m sandbox_kernel.launch -f FILE -- CMD…  a kernelspec of a user's: CMD, a command of the guest
    anything else                                    a stock kernelspec redirected here: that very command

The host's interpreter and the host's path of the connection file mean nothing in the guest: a path of a
Python becomes `python3`, and the connection file becomes the placeholder that the agent fills in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from sandbox_kernel.supervisor.control import CONNECTION_FILE

LAUNCHER = "sandbox_kernel.launch"
IPYKERNEL = ("python3", "-m", "ipykernel_launcher", "-f", CONNECTION_FILE)
_PYTHON = re.compile(r"(python|pypy)[0-9.]*")


def guest_argv(argv: Sequence[str], connection_file: str) -> tuple[str, ...]:
    """The command for the guest.

    Args:
        argv: the kernelspec's command with Jupyter's substitutions done.
        connection_file: the host's path in it.
    """
    words = [word.replace(connection_file, CONNECTION_FILE) if connection_file else word for word in argv]
    if LAUNCHER in words[:4]:
        after = words[words.index(LAUNCHER) + 1 :]
        words = after[after.index("--") + 1 :] if "--" in after else [*IPYKERNEL, *_extra(after)]
    if words and PurePosixPath(words[0]).is_absolute() and _PYTHON.fullmatch(PurePosixPath(words[0]).name):
        words[0] = "python3"
    return tuple(words)


def _extra(words: Sequence[str]) -> list[str]:
    """What was appended to our own argv (`extra_arguments`): all but the launcher's options and values."""
    rest = list(words)
    for option in ("-f", "--kernelspec"):
        if option in rest:
            at = rest.index(option)
            del rest[at : at + 2]
    return rest
