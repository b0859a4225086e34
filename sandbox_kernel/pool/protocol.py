"""What a provisioner and the pool say to each other: one line each way over a Unix socket. Little I/O.

    runtime/pool-service/socket     in the runtime directory; the folder is locked by the service that lives

    → {"op": "take", "surroundings": {…}, "shape": {…}}
    ← {"ok": true, "pid": 4711, "prepared": true}     with the client's end of the supervisor's control socket
                                                      and a pidfd of the supervisor
    → {"op": "status"}
    ← {"ok": true, "vms": […], "why_not": "…", …}
    ← {"ok": false, "message": "…"}                   the provisioner then does without

Both sides see to it that the other one is the same user (SO_PEERCRED, unix(7)). A supervisor of the pool is
only of use to a provisioner that would have started the same: same package, folders, tools and namespaces.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from sandbox_kernel import paths

FOLDER: Final = "pool-service"
"""In the runtime directory; no VM's id has a hyphen."""
SOCKET: Final = "socket"
MAX_LINE: Final = 64 * 1024
_CREDENTIALS = struct.Struct("3i")


def address() -> Path:
    """The service's socket, which need not be there.

    Raises:
        HostError: there is no runtime directory.
    """
    return paths.runtime_dir() / FOLDER / SOCKET


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(told)[1] == os.getuid())
