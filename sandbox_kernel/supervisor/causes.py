"""What has happened to a VM, as the error that its user is told."""

from __future__ import annotations

import errno

from sandbox_kernel.agent.client import KernelExit
from sandbox_kernel.errors import (
    HostError,
    KernelCrashed,
    KernelExited,
    MemoryLimitExceeded,
    NoSpaceError,
    SandboxKernelError,
)

_MIB = 1 << 20


def of_exit(ended: KernelExit, memory: int) -> SandboxKernelError:
    """Why a kernel is dead, in a VM with `memory` MiB."""
    if ended.out_of_memory:
        return MemoryLimitExceeded(
            f"The kernel was killed because the memory limit of {memory} MiB was reached; "
            "use less, or raise `memory`.",
            memory,
            "MiB",
            round(ended.memory_peak / _MIB, 1),
        )
    kind = KernelExited if ended.deliberate else KernelCrashed
    return kind(f"The kernel's process {ended.how()}; restart it to go on.")


def of_the_host(error: OSError) -> HostError:
    """Why a VM could not be set up."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"There is no space left for {error.filename or 'the VM'}; free some and try again."
        )
    return HostError(f"The VM could not be set up ({error}); run `sandbox-kernel doctor`.")
