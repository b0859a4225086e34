"""Where this package keeps things, by the XDG base directory specification.

    config   the pool's configuration     $XDG_CONFIG_HOME/sandbox-kernel
    data     images, templates            $XDG_DATA_HOME/sandbox-kernel
    cache    the accelerator's verdict    $XDG_CACHE_HOME/sandbox-kernel
    state    one folder of logs per VM    $XDG_STATE_HOME/sandbox-kernel
    runtime  one folder of sockets per VM $XDG_RUNTIME_DIR/sandbox-kernel, else /tmp/sandbox-kernel-UID

The runtime directory is short on purpose: a Unix socket's path has at most 107 bytes (unix(7)).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import platformdirs

from sandbox_kernel.errors import HostError, NoSpaceError

_APP = "sandbox-kernel"

LOG_BYTES = 1024 * 1024
"""Bytes of one log file, whatever a guest has to say."""


def data_dir() -> Path:
    """Folder of the images; not created here."""
    return Path(platformdirs.user_data_dir(_APP, appauthor=False))


def cache_dir() -> Path:
    """Folder of what can be found out again; not created here."""
    return Path(platformdirs.user_cache_dir(_APP, appauthor=False))


def config_dir() -> Path:
    """Folder of what the user has configured; not created here."""
    return Path(platformdirs.user_config_dir(_APP, appauthor=False))


def log_dir() -> Path:
    """Folder that holds one folder of logs per VM; not created here."""
    return Path(platformdirs.user_state_dir(_APP, appauthor=False)) / "vms"


def runtime_dir() -> Path:
    """Folder that holds one folder of sockets per VM; created with mode 0700.

    Raises:
        HostError: the folder exists and is not this user's own, which would let another user
            stand between a client and its kernel; or it cannot be made.
        NoSpaceError: there is no room for it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / _APP if base and Path(base).is_dir() else Path(f"/tmp/{_APP}-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
        raise kind(
            f"The runtime directory {path} cannot be made ({error.strerror}); make room there or point "
            "XDG_RUNTIME_DIR elsewhere."
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(
            f"The runtime directory {path} must be a directory of user {os.getuid()} with mode 0700; "
            "remove it or point XDG_RUNTIME_DIR elsewhere."
        )
    return path
