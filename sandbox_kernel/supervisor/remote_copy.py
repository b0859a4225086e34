"""Copies files and directories between this host and a VM of this user, whoever started its kernel.

    pull  guest → host      push  host → guest

Where a copy goes is as with `cp -r`: into a target that is a directory, under the source's name; otherwise
the target is the copy's own name, in a directory that exists. A source that ends in `/.` is what is in it. A
relative path of the guest starts at the kernel's home.

The tree travels as agent/tree describes, between this process and the guest's agent; both directions bound
it there. What a guest sends decides on names below the target and on nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sandbox_kernel.agent import answers
from sandbox_kernel.agent.protocol import COPY_SECONDS, HEADER, FrameError, parse_header, parse_message
from sandbox_kernel.agent.tree import (
    FormatError,
    Limits,
    NoRoom,
    Overflow,
    Place,
    Receiver,
    Sender,
    Spoken,
    Tally,
    Watch,
    Wire,
    WireError,
    reason_of,
)
from sandbox_kernel.errors import (
    ConfigurationError,
    GuestError,
    GuestProtocolError,
    LimitExceeded,
    NoSpaceError,
)
from sandbox_kernel.files.without_links import open_without_links
from sandbox_kernel.supervisor.remote import ask_for_connection, find

MAX_SIZE = 16 << 30
"""Bytes that a VM may send in one copy, unless more are asked for."""
MAX_FILES = 1_000_000
"""Files and directories that it may send."""
_LONGEST_PLACE = 300


@dataclass(frozen=True)
class Copied:
    """What came of a copy.

    Attributes:
        files, directories: how many of each.
        size: bytes of files.
        left_out: a sentence each of the first things that were not copied.
        unlisted: how many more there are.
        failed: how many of all of them should have been; links and special files should not.
    """

    files: int
    directories: int
    size: int
    left_out: tuple[str, ...]
    unlisted: int
    failed: int

    @classmethod
    def of(cls, tally: Tally) -> Copied:
        """What a tally comes to; its texts may be a guest's."""
        sentences = (
            f"{answers.plain(place, _LONGEST_PLACE) or 'the directory'}: {reason_of(reason)}"
            for place, reason in tally.problems
        )
        return cls(tally.files, tally.directories, tally.size, tuple(sentences), tally.unlisted, tally.failed)


def pull(
    vm: str,
    path: str,
    local: str,
    max_size: int = MAX_SIZE,
    max_files: int = MAX_FILES,
    watch: Watch | None = None,
) -> Copied:
    """Copies a file or directory of a guest to this host.

    Args:
        vm: beginning of the VM's name.
        path: the guest's.
        local: where it goes; no link is followed, in it and below it.
        max_size: bytes at most.
        max_files: files and directories at most, links and the like included.
        watch: called with how far it is.

    Raises:
        ConfigurationError: there is no such VM, or nothing can be put there.
        GuestError: the guest refuses or breaks off; what is complete stays.
        GuestProtocolError: it sends something else.
        LimitExceeded: it sends too much.
        NoSpaceError: the file system is full.
    """
    window, name = find(vm), name_of(path)
    with ExitStack() as stack:
        try:
            place = Place.at(local, name, lambda folder: _open(folder, os.O_DIRECTORY))
        except OSError as error:
            raise ConfigurationError(
                f"{local} is no place for a copy ({error.strerror}); make the directory that it is to be in."
            ) from error
        stack.callback(place.close)
        request = {"op": "copy", "to": "host", "path": path or "."}
        connection = stack.enter_context(ask_for_connection(window, request))
        receiver = Receiver(Wire(connection, COPY_SECONDS), Limits(max_size, max_files), watch)
        try:
            with _told(window.parent.name, receiver.tally):
                receiver.receive(place)
        except Overflow as error:
            if error.args[0] == "size":
                raise LimitExceeded(
                    f"{path} of the VM has more than {max_size >> 20} MiB, the most that is copied; raise "
                    "--max-size, or copy a part of it.",
                    max_size >> 20,
                    "MiB",
                ) from error
            raise LimitExceeded(
                f"{path} of the VM has more than {max_files} files, the most that are copied; raise "
                "--max-files, or copy a part of it.",
                max_files,
                "files",
            ) from error
        except NoRoom as error:
            raise NoSpaceError(
                f"There is no room for the copy in {local} ({error}); remove files there, or choose another "
                "place."
            ) from error
    return Copied.of(receiver.tally)


def push(vm: str, local: str, path: str, watch: Watch | None = None) -> Copied:
    """Copies a file or directory of this host into a guest.

    Args:
        vm: beginning of the VM's name.
        local: what; no link is followed, in it and below it.
        path: where it goes in the guest.
        watch: called with how far it is.

    Returns:
        What the guest says it has.

    Raises:
        ConfigurationError: there is no such VM, or nothing that can be copied.
        GuestError: the guest refuses or breaks off.
        GuestProtocolError: it answers something else.
    """
    window = find(vm)
    with ExitStack() as stack:
        try:
            fd = _open(local, os.O_DIRECTORY if not name_of(local) or local.endswith("/") else 0)
        except OSError as error:
            raise ConfigurationError(
                f"{local} cannot be copied ({error.strerror}); choose a file or directory that you may read."
            ) from error
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigurationError(
                f"{local} cannot be copied, as it is neither a file nor a directory; choose one."
            )
        request = {"op": "copy", "to": "guest", "path": path or ".", "name": name_of(local)}
        connection = stack.enter_context(ask_for_connection(window, request))
        wire = Wire(connection, COPY_SECONDS, heed=True)
        sender, complete, broken = Sender(wire, watch), False, ""
        try:
            sender.send(fd)
            complete = True
        except Spoken:
            pass
        except WireError as error:
            broken = str(error)
        with _told(window.parent.name, sender.tally, broken):
            answer = answers.accepted(_answer(wire))
        if not complete:
            raise GuestProtocolError(f"The VM {window.parent.name} was done with a copy before its end.")
        return Copied.of(answers.copied(answer))


def name_of(path: str) -> str:
    """What a copy of `path` is called; nothing where it is what is in there."""
    last = path.rstrip("/").rpartition("/")[2]
    return "" if last in (".", "..") else last


def _open(path: str, flags: int) -> int:
    return open_without_links(path, os.O_RDONLY | flags)


@contextmanager
def _told(vm: str, tally: Tally, broken: str = "") -> Iterator[None]:
    """Makes sentences of what a guest does wrong."""
    try:
        yield
    except (FormatError, FrameError) as error:
        raise GuestProtocolError(
            f"The VM {vm} broke the protocol of a copy ({answers.plain(str(error))}); what is complete stays."
        ) from error
    except WireError as error:
        at = answers.plain(tally.place, _LONGEST_PLACE)
        raise GuestError(
            f"The copy broke off{f' at {at}' if at else ''}, as the VM {vm} has ended or stands still "
            f"({broken or error}); what is complete stays."
        ) from error


def _answer(wire: Wire) -> dict[str, object]:
    json_length, payload_length = parse_header(wire.take(HEADER.size))
    if payload_length:
        raise FrameError(f"{payload_length} bytes that nobody asked for")
    return parse_message(wire.take(json_length))
