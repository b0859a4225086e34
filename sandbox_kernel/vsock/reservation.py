"""Whether the host's kernel does vsock, and a CID of one's own there.

All VMs of a host share one space of CIDs. The kernel tells whether one is free when it is claimed on an open
`/dev/vhost-vsock` (ioctl VHOST_VSOCK_SET_GUEST_CID, linux/vhost.h), and the claim lasts as long as that
descriptor, which QEMU inherits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
from pathlib import Path
from typing import IO, Final

from sandbox_kernel.errors import HostError

DEVICE: Final = Path("/dev/vhost-vsock")
_SET_GUEST_CID: Final = 0x4008AF60  # _IOW(0xAF, 0x60, __u64)
_FIRST: Final = 3  # 0 to 2 are the hypervisor, local and the host (vsock(7))
_LAST: Final = (1 << 31) - 1
_ATTEMPTS: Final = 32


def unavailable() -> str | None:
    """Why the kernel's vsock cannot be used on this machine; None when it can."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        return f"this kernel has no AF_VSOCK ({error.strerror}); modprobe vhost_vsock"
    if not DEVICE.exists():
        return f"{DEVICE} is missing; modprobe vhost_vsock"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by this user; add them to the group that owns it"
    return None


def reserve_cid() -> tuple[IO[bytes], int]:
    """Claims a free CID.

    Returns:
        The open device that holds the claim, for QEMU's `vhostfd=`, and the CID.

    Raises:
        HostError: the device cannot be opened, or no CID was free.
    """
    try:
        device = os.fdopen(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0)
    except OSError as error:
        raise HostError(
            f"{DEVICE} cannot be opened ({error.strerror}); choose vsock = 'userspace'."
        ) from error
    for _ in range(_ATTEMPTS):
        cid = random.SystemRandom().randint(_FIRST, _LAST)
        try:
            fcntl.ioctl(device, _SET_GUEST_CID, cid.to_bytes(8, "little"))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            device.close()
            raise HostError(
                f"{DEVICE} refuses a CID ({error.strerror}); choose vsock = 'userspace'."
            ) from error
        return device, cid
    device.close()
    raise HostError(f"None of {_ATTEMPTS} CIDs was free on {DEVICE}; choose vsock = 'userspace'.")
