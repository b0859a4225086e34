"""Where a tree goes, as a user means it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable


class Place:
    """Where a tree goes.

    Attributes:
        fd: an open directory, the place's own.
        name: what the tree is called in it; nothing: what the tree has in it goes right there.
        folder: whether only a directory may go there.
    """

    def __init__(self, fd: int, name: bytes, folder: bool = False) -> None:
        self.fd, self.name, self.folder = fd, name, folder

    @classmethod
    def at(cls, path: str, name: str, open_directory: Callable[[str], int]) -> Place:
        """The place that a user means by `path`.

        In a directory that exists, the tree gets the name that it has; otherwise it gets the last name of
        `path`, in a directory that exists.

        Args:
            path: as written.
            name: the tree's own; nothing for what is in it.
            open_directory: opens one by its path, or raises FileNotFoundError or NotADirectoryError.

        Raises:
            OSError: there is no directory for it.
        """
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        trimmed = path.rstrip("/") or "/"
        above, last = os.path.split(trimmed)
        try:
            return cls(open_directory(trimmed), os.fsencode(name), not name)
        except (FileNotFoundError, NotADirectoryError):
            if last in ("", ".", ".."):
                raise
        # It is on the way to the place, not the place: whether a link may stand there, the caller decides.
        return cls(open_directory(f"{above or '.'}/."), os.fsencode(last), path.endswith("/"))

    def close(self) -> None:
        """Lets go of the directory."""
        os.close(self.fd)
