"""A tree of files as a stream: how it is written down, sent from a directory, received into one.

Both ends of a copy are this package, on the host and, copied there as `agent_tree`, in the guest; it imports
nothing but the standard library and itself. A stream is records, big-endian, some with something behind them:

    kind 1 byte, length of the name 1, mode 2, mtime 8 (signed, ns since the epoch), size 8; the name

    D  a directory, of which all that follows is a part up to its U
    F  a file of about `size` bytes, whose content follows in pieces: length 4, bytes. Each piece has PIECE
       bytes but the last, which has fewer, perhaps none; a length of BROKEN and more ends a file that cannot
       be read to its end, for the reason `length - BROKEN`
    S  something that is left out, for the reason in `mode`; without a name the directory that it stands in,
       of which the rest cannot be read
    U  the end of a directory
    E  the end, after the one D…U or F that a stream has; that one has no name, as its receiver has chosen it

Rules, which hold whoever the peer is, and whatever others do to the files meanwhile:

1. Every path is walked from an open directory, name by name, and no link is followed on either side.
2. Only directories and regular files are sent, only permission bits kept, less what the umask takes.
3. A file is written without a name, or under another one where the file system knows no nameless ones, and
   gets its name when it is complete. It replaces a regular file and nothing else.
4. A peer decides on names below the top, and on nothing else; each is checked. What it sends is bounded by
   `Limits`, its depth by MAX_DEPTH, the time for each piece and record by the `Wire`.
5. What cannot be read or written is left out and named (`Tally`); the rest goes on, unless there is no room.
"""

from __future__ import annotations

from .form import (
    BROKEN,
    DEEP,
    DIRECTORY,
    END,
    FILE,
    HEAD,
    LEFT_OUT,
    LENGTH,
    LINK,
    MAX_DEPTH,
    MAX_PROBLEMS,
    PIECE,
    SPECIAL,
    TAKEN,
    UP,
    FormatError,
    Limits,
    NoRoom,
    Overflow,
    Spoken,
    Tally,
    Watch,
    WireError,
    reason_of,
)
from .place import Place
from .receiver import Receiver
from .sender import Sender
from .wire import Wire

__all__ = [
    "BROKEN",
    "DEEP",
    "DIRECTORY",
    "END",
    "FILE",
    "HEAD",
    "LEFT_OUT",
    "LENGTH",
    "LINK",
    "MAX_DEPTH",
    "MAX_PROBLEMS",
    "PIECE",
    "SPECIAL",
    "TAKEN",
    "UP",
    "FormatError",
    "Limits",
    "NoRoom",
    "Overflow",
    "Place",
    "Receiver",
    "Sender",
    "Spoken",
    "Tally",
    "Watch",
    "Wire",
    "WireError",
    "reason_of",
]
