"""How a provisioner gets a supervisor from the pool, and does without when there is none."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from typing import Any

from sandbox_kernel.errors import HostError, SandboxKernelError
from sandbox_kernel.pool.protocol import MAX_LINE, address, same_user
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.control import from_line, to_line
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.lifeline import Ward
from sandbox_kernel.supervisor.surroundings import surroundings

log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds that a pool may take; a kernel's start shall not depend on it."""


def take(spec: VMSpec) -> SupervisorHandle | None:
    """A supervisor from the pool, with a VM for `spec` ready if there is one; used by nobody before or after.

    None when there is no pool, or not one for this process. Blocks, briefly.
    """
    try:
        answer, fds = _ask(
            {"op": "take", "surroundings": surroundings(), "shape": dataclasses.asdict(spec.shape)}
        )
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, SandboxKernelError) as error:
        log.warning("the pool is of no use (%s); the kernel starts without", error)
        return None
    if len(fds) != 2 or not isinstance(answer.get("pid"), int):
        for fd in fds:
            os.close(fd)
        log.info("the pool gives no VM: %s", answer.get("message"))
        return None
    return SupervisorHandle(Ward(answer["pid"], fds[1]), socket.socket(fileno=fds[0]))


def status() -> dict[str, Any]:
    """What the pool says of itself.

    Raises:
        HostError: there is none, or it does not answer.
    """
    try:
        answer, _ = _ask({"op": "status"})
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise HostError("No pool runs for this user; start one with `sandbox-kernel pool`.") from error
    except OSError as error:
        raise HostError(f"The pool does not answer ({error}); restart it.") from error
    return answer


def _ask(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE)
        connection.connect(str(address()))
        if not same_user(connection):
            raise PermissionError("another user's service answers")
        connection.sendall(to_line(request))
        text, fds, _, _ = socket.recv_fds(connection, MAX_LINE, 2, socket.MSG_CMSG_CLOEXEC)
        while not text.endswith(b"\n"):
            more = connection.recv(MAX_LINE)
            if not more or len(text) > MAX_LINE:
                for fd in fds:
                    os.close(fd)
                raise ConnectionResetError("it hung up")
            text += more
    return from_line(text), fds
