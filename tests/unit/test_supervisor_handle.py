"""The client's handle on a supervisor that is a socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from sandbox_kernel.errors import GuestError
from sandbox_kernel.supervisor.control import failure, to_line
from sandbox_kernel.supervisor.handle import SupervisorHandle


class Living:
    """A lifeline of a supervisor that has not ended yet."""

    pid = os.getpid()

    def poll(self, told: int | None) -> int | None:
        return None

    def kill(self) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def ends() -> Iterator[tuple[SupervisorHandle, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield SupervisorHandle(Living(), ours), theirs


def test_a_signal_that_the_guest_did_not_take_is_an_error(
    ends: tuple[SupervisorHandle, socket.socket],
) -> None:
    handle, supervisor = ends
    supervisor.sendall(to_line(failure(GuestError("The guest's agent did not answer in time."))))
    with pytest.raises(GuestError, match="did not answer in time"):
        handle.signal(2)


def test_a_signal_to_a_kernel_whose_supervisor_has_hung_up_goes_to_nobody(
    ends: tuple[SupervisorHandle, socket.socket],
) -> None:
    handle, supervisor = ends
    supervisor.close()
    assert handle.signal(2) is False


def test_a_signal_that_arrives_says_whether_the_kernel_lives(
    ends: tuple[SupervisorHandle, socket.socket],
) -> None:
    handle, supervisor = ends
    supervisor.sendall(to_line({"ok": True, "alive": True}))
    assert handle.signal(0) is True
