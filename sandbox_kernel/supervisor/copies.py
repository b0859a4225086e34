"""The supervisor's part of a copy: it asks the guest for it, and gives the connection to whoever copies.

No byte of a file passes through here, so that a copy costs the kernel's channels nothing; and whoever copies
has a connection on which the guest's agent takes nothing but that copy (agent/tree).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from sandbox_kernel.errors import ConfigurationError, GuestError
from sandbox_kernel.machine.machine import Machine

_CONNECT = 10.0


async def begin(machine: Machine, request: Mapping[str, Any]) -> socket.socket:
    """Has the guest begin the copy that is asked for.

    Args:
        machine: whose guest.
        request: `to` is "host" or "guest", `path` the guest's, `name` as in `AgentClient.push`.

    Returns:
        The connection that the copy is made over; the caller's to close.

    Raises:
        ConfigurationError: the request is malformed.
        GuestError: the guest refuses, with a sentence, or cannot be reached.
    """
    to, path, name = request.get("to"), request.get("path"), request.get("name", "")
    if to not in ("host", "guest") or not isinstance(path, str) or not isinstance(name, str):
        raise ConfigurationError("A copy has a `path` and goes `to` the host or the guest.")
    try:
        agent = await machine.connect_agent(_CONNECT)
        try:
            return await (agent.pull(path) if to == "host" else agent.push(path, name))
        except BaseException:
            await agent.aclose()
            raise
    except OSError as error:
        raise GuestError(f"The VM's agent cannot be reached ({error}); restart the kernel.") from error
