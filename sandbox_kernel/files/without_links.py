"""Opens paths of this host without following a link, wherever in the path one stands.

A guest may have put links into what it has mounted, and a path that a user writes may lead through one.
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_kernel.errors import ConfigurationError

_ON_THE_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LAST = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def open_without_links(path: str, flags: int) -> int:
    """A descriptor of what is at `path`, opened without waiting.

    Args:
        path: absolute, or from the present directory.
        flags: of open(2), to which those against links are added.

    Raises:
        ConfigurationError: there is a link in it.
        OSError: it cannot be opened.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    names = [name for name in path.split("/") if name not in ("", ".")] or ["."]
    folder = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = "."
    try:
        for name in names[:-1]:
            inner = os.open(name, _ON_THE_WAY, dir_fd=folder)
            os.close(folder)
            folder = inner
        name = names[-1]
        return os.open(name, flags | _LAST, dir_fd=folder)
    except OSError as error:
        if _is_link(folder, name):
            raise ConfigurationError(
                f"{path} leads over a link ({name}), and none is followed on the host; write where it leads "
                f"to: {os.path.realpath(path)}."
            ) from error
        raise
    finally:
        os.close(folder)


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
