"""What a guest cannot know by itself: time, name, randomness, limits. Checked whole, then applied."""

from __future__ import annotations

import socket
import time

import cgroup
import fields
import network
import scratch
import system
from agent_protocol import MAX_ENTROPY
from fields import Request
from settings import Settings

_LONGEST_NAME = 64
_LARGEST = 2**63 - 1
_MOST_PIDS = 4194304 - 2048
"""Linux' own limit on PIDs, less what the agent needs."""


class Configuration:
    """The fields of `configure`, each of which may be missing, and its entropy."""

    def __init__(self, request: Request, entropy: bytes) -> None:
        """Raises ValueError over a field that makes no sense; nothing has been changed then."""
        if len(entropy) > MAX_ENTROPY:
            raise ValueError(f"entropy is at most {MAX_ENTROPY} bytes")
        self._entropy = entropy
        self._clock = fields.integer(request, "clock", 0, _LARGEST) if "clock" in request else None
        self._step = fields.integer(request, "step", -_LARGEST, _LARGEST) if "step" in request else None
        self._hostname = fields.text(request, "hostname", _LONGEST_NAME) if "hostname" in request else None
        self._pids = fields.integer(request, "pids", 16, _MOST_PIDS) if "pids" in request else None
        self.scratch = request.get("scratch") is True
        """Whether the kernel's files are to be on the scratch disk."""
        self._reserve = fields.integer(request, "reserve", 0, _LARGEST) if "reserve" in request else None
        self._network = network.Network(fields.mapping(request, "network")) if "network" in request else None

    def apply(self, settings: Settings, cloned: bool) -> None:
        """Changes the guest.

        Args:
            settings: where its cgroups are.
            cloned: whether it is a copy that needs ids of its own, drawn when it has got entropy.

        Raises:
            OSError: Linux refused.
        """
        if self._clock is not None:
            time.clock_settime_ns(time.CLOCK_REALTIME, self._clock)
        if self._step is not None:
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + self._step)
        if self._hostname is not None and self._hostname != socket.gethostname():
            socket.sethostname(self._hostname)
        if self._entropy:
            system.add_entropy(self._entropy)
            if cloned:
                system.new_identity()
        if self._pids is not None:
            cgroup.limit_pids(settings, self._pids)
        if self._reserve is not None:
            cgroup.limit_memory(settings, self._reserve)
        if self.scratch:
            scratch.use(settings)
        if self._network is not None:
            self._network.use()
