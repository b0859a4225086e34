"""The states of a machine and every allowed move between them. Nobody else assigns a state.

NEW ──▶ BOOTING ──▶ READY ──▶ STOPPING ──▶ DEAD
          │           │                      ▲
          └───────────┴──────────────────────┘   (QEMU ended, or the guest broke a protocol)
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a machine stands."""

    NEW = "new"
    BOOTING = "booting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


_MOVES = {
    State.NEW: {State.BOOTING, State.DEAD},
    State.BOOTING: {State.READY, State.STOPPING, State.DEAD},
    State.READY: {State.STOPPING, State.DEAD},
    State.STOPPING: {State.DEAD},
    State.DEAD: set(),
}


class Lifecycle:
    """Holds a machine's state and refuses moves that make no sense."""

    def __init__(self) -> None:
        self._state = State.NEW

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    def move(self, target: State) -> None:
        """Goes to `target`.

        Raises:
            RuntimeError: the move is not in the table: a mistake in this package.
        """
        if target not in _MOVES[self._state]:
            raise RuntimeError(f"A machine cannot go from {self._state.value} to {target.value}.")
        self._state = target
