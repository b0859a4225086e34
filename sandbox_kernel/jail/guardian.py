"""The guardian: what removes files and cgroup, of a VM or a service, when nobody else can any more.

A handler does not run in a process that got SIGKILL. What the kernel does guarantee is that the descriptors
of a dead process are closed. So each supervisor starts one small shell that reads a pipe whose only writer
is the supervisor; when the pipe ends, for whatever reason, the shell kills what is left in the cgroup and
removes the VM's folders. It is the one way out, also of an orderly stop, and therefore always tested.

The guardian also holds, without using them, descriptors that shall be seen to close only when it is done: the
lock on the VM's folder, and the supervisor's end of the client's socket.

What the supervisor writes to the pipe before it goes decides what is removed, a line each: `keep` keeps the
logs, `also PATH` adds a folder, which the sockets have been moved to, `socket DEVICE:INODE PATH` a Unix
socket that lies elsewhere, unless something else is there by then, and `closed` with the same takes that
back.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_SCRIPT = r"""
trap '' INT TERM HUP
runtime=$1 logs=$2
shift 2
verdict= moved= sockets=
while read -r word path; do
    case $word in
    keep) verdict=keep ;;
    also) moved=$path ;;
    socket) sockets=$(printf '%s\n%s' "$sockets" "$path") ;;
    closed) sockets=$(printf '%s' "$sockets" | grep -vxF -- "$path") ;;
    esac
done
for group in "$@"; do
    tries=0
    while [ -d "$group" ] && ! rmdir "$group" 2>/dev/null && [ $tries -lt 100 ]; do
        while read -r pid; do kill -9 "$pid" 2>/dev/null; done < "$group/cgroup.procs"
        tries=$((tries + 1))
        sleep 0.02
    done
done
printf '%s\n' "$sockets" | while read -r identity path; do
    [ -S "$path" ] && [ "$(stat -c %d:%i -- "$path")" = "$identity" ] && rm -f -- "$path"
done
[ "$verdict" = keep ] || rm -rf -- ${logs:+"$logs"}
rm -rf -- "$runtime" ${moved:+"$moved"}
"""


class Guardian:
    """One guardian, for as long as the process that made it lives."""

    def __init__(
        self, runtime: Path, logs: Path | None, cgroups: Sequence[Path], hold: Sequence[int] = ()
    ) -> None:
        """Starts the guardian.

        Args:
            runtime: the folder of sockets.
            logs: the VM's folder of logs; None for what has none.
            cgroups: the folders of its cgroup.
            hold: descriptors that the guardian keeps open until it is done.
        """
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                _SCRIPT,
                "sandbox-kernel-guardian",
                str(runtime),
                str(logs or ""),
                *map(str, cgroups),
            ],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=tuple(hold),
            start_new_session=True,
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
        )
        os.close(reader)

    @property
    def pid(self) -> int:
        """The guardian's process."""
        return self._process.pid

    def dismiss(self) -> None:
        """Has it clean up now, and returns when that is done."""
        os.close(self._writer)
        self._process.wait()

    def reap(self) -> None:
        """Waits for a guardian that is known to be dead."""
        self._process.wait()
        os.close(self._writer)

    def keep_logs(self) -> None:
        """Tells the guardian to leave the logs when it cleans up: an error names them."""
        self._tell("keep")

    def also(self, folder: Path) -> None:
        """Tells the guardian to remove `folder`, too, which may not be there."""
        self._tell(f"also {folder}")

    def guard(self, socket: str) -> None:
        """Tells the guardian to remove a Unix socket, `DEVICE:INODE PATH`."""
        self._tell(f"socket {socket}")

    def release(self, socket: str) -> None:
        """The same socket is for somebody else to remove from now on, or has been."""
        self._tell(f"closed {socket}")

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):
            os.write(self._writer, os.fsencode(f"{line}\n"))
