"""Runs one system tool to its end, and turns what can go wrong with it into this package's errors.

Rules kept here:

1. A tool dies with us, and all that it started: between us and it stands a shell that gets SIGTERM when we
   are gone (prctl(2), PR_SET_PDEATHSIG) and then kills the tool's whole process group. Asking politely does
   not do: mmdebstrap, told to end, first finishes what its children are at. What a tool leaves behind lies
   in folders of ours, which we remove.
2. An interruption (Ctrl-C, SIGTERM turned into an exception) ends the tool in the same way before it goes on
   up, and waits until nobody holds the tool's output open any more.
3. A tool's failure is one sentence with the tool's own last words; a full disk is told apart from the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from sandbox_kernel.errors import HostError, ImageError, MissingToolError, NoSpaceError

_TETHER = """
trap '[ "$!" ] || exit 143; kill -s KILL -- "-$!"' TERM
exec 3<&0
setsid -- "$@" <&3 3<&- &
exec 3<&-
wait $!
code=$?
wait $!
exit $code
"""
_GONE = 10.0
"""Seconds until a killed tool and all that it started are gone."""
_TELLING = ("e:", "error", "fatal", "×")
"""How the line begins with which a tool starts to say what is wrong."""
_WORDS = 600
"""Characters of a tool's own words in an error."""
_NO_SPACE = ("no space left on device", "disk quota exceeded", "enospc")


def find(program: str) -> Path:
    """Where `program` is on the search path, or in the directories of system programs beside it.

    Raises:
        MissingToolError: it is not installed.
    """
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        raise MissingToolError(f"{program} is not installed; run `sandbox-kernel setup`.")
    return Path(found)


class Running:
    """A tool that has been started; a context manager that lets none outlive it."""

    def __init__(self, process: subprocess.Popen[bytes], purpose: str, allowed: Sequence[int]) -> None:
        self._process = process
        self._purpose = purpose
        self._allowed = allowed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.returncode is None:
            _end(self._process)

    def output(self, stdin: bytes | None = None) -> bytes:
        """Waits for the tool's end and returns its standard output.

        Args:
            stdin: what it reads.

        Raises:
            NoSpaceError: it ran into a full file system.
            ImageError: it failed in another way; the message ends with its own words.
        """
        output, complaint = self._process.communicate(stdin)
        if self._process.returncode not in self._allowed:
            raise _failure(self._purpose, self._process.returncode, complaint.decode(errors="replace"))
        return output


def start(
    argv: Sequence[str | Path],
    *,
    purpose: str,
    env: Mapping[str, str] | None = None,
    allowed: Sequence[int] = (0,),
) -> Running:
    """Starts a tool that works while its caller does something else.

    Args:
        argv: the tool (a name to look up, or a path) and its arguments.
        purpose: what it is run for, as the subject of "… failed".
        env: its environment; ours when None.
        allowed: exit codes that are no failure.

    Raises:
        MissingToolError: the tool is not installed.
    """
    words = [str(find(str(argv[0]))), *map(str, argv[1:])]
    tether = [str(find("setpriv")), "--pdeathsig", "TERM", "--", "/bin/sh", "-c", _TETHER, "tether"]
    process = subprocess.Popen(
        [*tether, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=None if env is None else dict(env),
    )
    return Running(process, purpose, allowed)


def run(
    argv: Sequence[str | Path],
    *,
    purpose: str,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    allowed: Sequence[int] = (0,),
) -> bytes:
    """Runs a tool to its end and returns its standard output; arguments and errors as for `start`."""
    with start(argv, purpose=purpose, env=env, allowed=allowed) as running:
        return running.output(stdin)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdin = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        # To the end of its output: whoever still runs has it open.
        process.communicate(timeout=_GONE)


def _failure(purpose: str, code: int, complaint: str) -> HostError:
    if any(words in complaint.lower() for words in _NO_SPACE):
        return NoSpaceError(f"{purpose} ran out of space; free some and run the command again.")
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    telling = next((i for i, line in enumerate(lines) if line.lower().startswith(_TELLING)), len(lines) - 1)
    words = " ".join(lines[telling:]) or f"exit status {code}"
    return ImageError(f"{purpose} failed: {words[:_WORDS]}")


@contextlib.contextmanager
def disk_errors(*folders: Path) -> Iterator[None]:
    """Turns what the operating system says about files into this package's errors.

    Args:
        folders: where the work inside writes.

    Raises:
        NoSpaceError: a file system is full; the message names the fullest of those of `folders`.
        ImageError: anything else, such as a folder that may not be written.
    """
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(f"{str(error).split(';')[0]}; {_fullest(folders)}.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ImageError(f"Building an image failed at {error.filename}: {error.strerror}.") from error
        raise NoSpaceError(f"The build ran out of space; {_fullest(folders)}.") from error


def require_space(folder: Path, need: int, purpose: str) -> None:
    """Refuses work that cannot end well.

    Args:
        folder: any folder of the file system in question; it need not exist yet.
        need: bytes that must be free.
        purpose: what they are needed for, as the subject of "needs".

    Raises:
        NoSpaceError: there is less.
    """
    free = free_space(folder)
    if free < need:
        raise NoSpaceError(
            f"{purpose} needs {need / 1e9:.1f} GB and the file system {mount_point(folder)} has "
            f"{free / 1e9:.1f} GB free; free some space there."
        )


def free_space(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder` or of its nearest parent."""
    found = os.statvfs(_existing(folder))
    return found.f_bavail * found.f_frsize


def mount_point(folder: Path) -> Path:
    """Where the file system of `folder` (or of its nearest existing parent) is mounted."""
    path = _existing(folder).resolve()
    while not path.is_mount():
        path = path.parent
    return path


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _fullest(folders: Sequence[Path]) -> str:
    worst = min(folders, key=free_space)
    free = free_space(worst) / 1e6
    return f"the file system {mount_point(worst)} has {free:.0f} MB left; free some space there"
