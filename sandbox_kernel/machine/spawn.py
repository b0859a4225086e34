"""Starts QEMU's jail, held back before QEMU's first instruction; waits for nothing, needs no event loop."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox_kernel.errors import TemplateUnsafeError
from sandbox_kernel.jail.bubblewrap import Jail

if TYPE_CHECKING:
    from sandbox_kernel.jail.lender import Lender


@dataclass(frozen=True)
class Spawned:
    """A jail that has been started and waits; `QemuProcess.start` takes it from here.

    Attributes:
        popen: bubblewrap.
        info: where bubblewrap reports the PID of QEMU to be.
        block: QEMU runs when there is a byte to read at the other end of it.
        errors: what both write to standard error.
        lender: answers when QEMU opens its RAM; None where it needs nobody for that.
    """

    popen: subprocess.Popen[bytes]
    info: int
    block: int
    errors: int
    lender: Lender | None


def spawn(jail: Jail, argv: Sequence[str], fds: Sequence[int], lender: Lender | None = None) -> Spawned:
    """Starts `argv` in `jail`, needs no event loop, and waits for nothing but the exec of bubblewrap.

    Args:
        jail: what it may see.
        argv: QEMU's command line.
        fds: descriptors it inherits under the same numbers.
        lender: lends it its RAM; from now on closed by whoever ends the process.

    Raises:
        OSError: bubblewrap cannot be run.
        TemplateUnsafeError: the RAM cannot be lent on this host.
    """
    info_reader, info_writer = os.pipe2(os.O_CLOEXEC)
    block_reader, block_writer = os.pipe2(os.O_CLOEXEC)
    error_reader, error_writer = os.pipe2(os.O_CLOEXEC)
    try:
        popen = _run(
            jail,
            jail.command(argv, info_fd=info_writer, block_fd=block_reader),
            error_writer,
            (*fds, info_writer, block_reader),
            lender,
        )
    except BaseException:
        for fd in (info_reader, block_writer, error_reader):
            os.close(fd)
        if lender is not None:
            lender.close()
        raise
    finally:
        for fd in (info_writer, block_reader, error_writer):
            os.close(fd)
    return Spawned(popen, info_reader, block_writer, error_reader, lender)


def unsafe(reason: str) -> TemplateUnsafeError:
    """The error for a QEMU that cannot have its RAM, as it could write to it otherwise."""
    return TemplateUnsafeError(
        f"QEMU before 8.2 cannot be given a template's RAM without the right to write to it here ({reason}); "
        "install QEMU 8.2 or later."
    )


def _run(
    jail: Jail, command: list[str], errors: int, fds: tuple[int, ...], lender: Lender | None
) -> subprocess.Popen[bytes]:
    if lender is not None and jail.needs_set_uid:
        raise unsafe(f"{jail.bwrap} is set-uid root")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=fds, cwd="/"
        )

    if lender is None:
        return start()
    try:
        return lender.run(start)
    except OSError as error:
        if lender.refusal:
            raise unsafe(lender.refusal) from error
        raise
