"""Trees of files that the host copies from and into this guest, with the rights of the kernel's user.

A copy is asked for like anything else; once that is granted, its connection carries the tree (agent_tree/)
and nothing more. What stands in the guest's files is user code's to decide, at any moment: see files.py, the
rules of which hold here, too. One thread a copy, which acts as the user as long as it touches files.
"""

from __future__ import annotations

import os
import socket
import stat
import threading

import files
from agent_protocol import COPY_SECONDS, MAX_COPIES, pack
from agent_tree import FormatError, Limits, NoRoom, Overflow, Place, Receiver, Sender, Wire, WireError
from answer import Copy, Refused
from settings import Settings


class Copies:
    """The copies of one guest, a few at a time: the agent keeps connections for what matters more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = threading.BoundedSemaphore(MAX_COPIES)

    def pull(self, path: str) -> Copy:
        """A copy of what is at `path`, on its way to the host.

        Raises:
            OSError: the user may not read it, or there is nothing.
            ValueError: it is neither a file nor a directory.
            Refused: there are too many copies.
        """
        fd = files.open_as_user(self._settings, _trimmed(path), os.O_RDONLY)
        try:
            found = os.fstat(fd)
            kinds = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
            if not kinds or found.st_dev in files.not_files():
                raise ValueError(f"{path} is neither a file nor a directory to be copied")
            return _Pull(self._settings, self._places, fd)
        except BaseException:
            os.close(fd)
            raise

    def push(self, path: str, name: str) -> Copy:
        """A copy on its way from the host, to `path` or, in a directory of that path, to `name`.

        Raises:
            OSError: there is no directory for it.
            ValueError: files cannot be put there.
            Refused: there are too many copies.
        """
        place = Place.at(os.path.join(self._settings.home, path), name, self._open_directory)
        try:
            if os.fstat(place.fd).st_dev in files.not_files():
                raise ValueError(f"{path} is no place for files")
            return _Push(self._settings, self._places, place)
        except BaseException:
            place.close()
            raise

    def _open_directory(self, path: str) -> int:
        return files.open_as_user(self._settings, path, os.O_RDONLY | os.O_DIRECTORY)


class _Placed(Copy):
    """A copy that has taken one of the places, and has open what it copies from the beginning."""

    def __init__(self, settings: Settings, places: threading.BoundedSemaphore) -> None:
        if not places.acquire(blocking=False):
            raise Refused("failed", f"copy: there are {MAX_COPIES} copies under way, which is the most")
        self._settings, self._places = settings, places

    def close(self) -> None:
        self._places.release()


class _Pull(_Placed):
    def __init__(self, settings: Settings, places: threading.BoundedSemaphore, fd: int) -> None:
        super().__init__(settings, places)
        self._fd = fd

    def run(self, connection: socket.socket) -> None:
        try:
            sender = Sender(Wire(connection, COPY_SECONDS), None, files.not_files())
            with files.AsUser(self._settings):
                sender.send(self._fd)
        except (WireError, OSError):
            pass  # the host has hung up, or sees that the tree has no end

    def close(self) -> None:
        os.close(self._fd)
        super().close()


class _Push(_Placed):
    def __init__(self, settings: Settings, places: threading.BoundedSemaphore, place: Place) -> None:
        super().__init__(settings, places)
        self._place = place

    def run(self, connection: socket.socket) -> None:
        wire = Wire(connection, COPY_SECONDS)
        receiver = Receiver(wire, Limits())
        answer: dict[str, object]
        try:
            with files.AsUser(self._settings):
                receiver.receive(self._place)
            tally = receiver.tally
            answer = {
                "ok": True,
                "files": tally.files,
                "directories": tally.directories,
                "size": tally.size,
                "failed": tally.failed,
                "unlisted": tally.unlisted,
                "problems": [list(each) for each in tally.problems],
            }
        except NoRoom as error:
            sentence = (
                f"There is no room for {receiver.tally.place} in the guest ({error}); remove files there."
            )
            answer = {"ok": False, "error": "failed", "message": sentence}
        except (FormatError, Overflow) as error:
            answer = {"ok": False, "error": "malformed", "message": f"push: {error}"}
        except (WireError, OSError):
            return
        try:
            wire.put(pack(answer))
            wire.flush()
            # The host may be sending still, and reads the answer when it has noticed, unless it is reset.
            wire.drain()
        except (WireError, OSError):
            pass

    def close(self) -> None:
        self._place.close()
        super().close()


def _trimmed(path: str) -> str:
    return path.rstrip("/") or "/"
