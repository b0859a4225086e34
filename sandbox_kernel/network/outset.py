"""The outset of a network, which needs no event loop: the namespace's holder, which takes longest to come up.

A supervisor starts it beside QEMU, before it imports what a VM's life needs.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sandbox_kernel.jail.bubblewrap import find
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.jail.parent import ParentThread
from sandbox_kernel.jail.words import Words

_TOOLS = {"nft": "nftables", "slirp4netns": "slirp4netns", "unshare": "util-linux", "bwrap": "bubblewrap"}
"""Programs and the packages that have them."""
_INSTALL = "install the package {} or take `network` out of the configuration"
_KILLED = 2.0
_WORDS = 500


@dataclass(frozen=True)
class Part:
    """A program that runs for as long as the namespace does.

    Attributes:
        process: it.
        words: what it says.
        parent: of which thread it is a child.
    """

    process: subprocess.Popen[bytes]
    words: Words
    parent: ParentThread

    def last_words(self) -> str:
        """What it has said, when it has ended or is about to."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILLED)
        return self.words.take()[-_WORDS:]

    def end(self) -> None:
        """Ends it."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILLED)
        self.words.close()
        self.parent.close()


@dataclass
class Outset:
    """A holder that comes up, and that nobody talks to yet.

    Attributes:
        tools: paths of programs, by their names.
        connection: to it; does not block.
        holder: it.
        taken: whether a `Namespace` has taken all of this over.
    """

    tools: Mapping[str, str]
    connection: socket.socket
    holder: Part
    taken: bool = False

    def abandon(self) -> None:
        """Ends it, unless it has been taken over; idempotent."""
        if not self.taken:
            self.taken = True
            self.connection.close()
            self.holder.end()


def set_out(cgroup: Cgroup) -> Outset:
    """Starts a holder.

    Args:
        cgroup: joined by it.

    Raises:
        MissingToolError: a program is missing.
    """
    tools = {name: str(find(name, _INSTALL.format(package))) for name, package in _TOOLS.items()}
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    words = [tools["unshare"], "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    words += ["--mount-proc", "--", sys.executable, "-P", "-m", "sandbox_kernel.network.holder"]
    words += [str(far.fileno()), json.dumps(tools)]
    with far:
        try:
            return Outset(tools, near, start(words, (far.fileno(),), cgroup))
        except BaseException:
            near.close()
            raise


def start(argv: Sequence[str], fds: Sequence[int], cgroup: Cgroup) -> Part:
    """Starts a part.

    Args:
        argv: its command line.
        fds: descriptors that it inherits under the same numbers.
        cgroup: joined by it.
    """
    parent, words = ParentThread(), Words()

    def begin() -> subprocess.Popen[bytes]:
        born = cgroup.join()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words.end,
            pass_fds=fds,
        )
        if not born:
            cgroup.add(process.pid)
        return process

    try:
        process = parent.run(begin)
    except BaseException:
        words.close()
        raise
    words.begun()
    return Part(process, words, parent)
