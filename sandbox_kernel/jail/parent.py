"""A thread that a child is started from, and that stays until the child has ended.

What holds for a thread holds for the children that it starts: a seccomp filter, a cgroup (v1). So it is set
up in a thread made for that, and not between fork and exec, which would cost Python its vfork(2) (2 ms).
The thread has to stay, as a parent-death signal (PR_SET_PDEATHSIG, prctl(2)) comes when that thread dies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class ParentThread:
    """The parent of one child."""

    def __init__(self) -> None:
        """One that has not begun."""
        self._ended = threading.Event()

    def run(self, start: Callable[[], _T]) -> _T:
        """Calls `start` in a thread of its own, which stays until `close`; returns or raises what it does."""
        results: list[_T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def begin() -> None:
            try:
                results.append(start())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()
            self._ended.wait()

        threading.Thread(target=begin, name="parent-of-qemu", daemon=True).start()
        done.wait()
        if errors:
            self.close()
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Lets the thread end, when the child has ended; idempotent."""
        self._ended.set()
