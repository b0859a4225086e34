"""Every error this package raises, sorted by whose fault it is.

    SandboxKernelError
    ├── ConfigurationError      the user asked for something that is not allowed
    │   └── VolumeBusy          a volume is attached, in a way that excludes what is asked for
    ├── HostError               this machine lacks something: a tool, space, a device, an image
    │   ├── MissingToolError
    │   ├── AcceleratorError
    │   ├── ImageError
    │   ├── NoSpaceError
    │   ├── NetworkError        a VM's network cannot be had, or has ended
    │   ├── HostShuttingDown    somebody on the host ended the VM: its administrator, or its shutdown
    │   └── TemplateError       a saved VM cannot be made or restored; kernels boot instead
    │       └── TemplateUnsafeError  it is good, but could not be protected from what is restored from it
    ├── GuestError              the VM did not do its part
    │   ├── GuestProtocolError  it broke a protocol and is not to be trusted any more
    │   ├── BootError           it did not come up in time
    │   ├── KernelStartError    it came up, the kernel's command did not
    │   ├── MountError          it could not mount a directory of the host
    │   ├── VolumeError         it could not mount a volume
    │   ├── KernelExited        the kernel ended, or was ended by a signal that somebody in the guest sent
    │   ├── KernelCrashed       the kernel's interpreter crashed
    │   ├── GuestPanicked       the guest's Linux did
    │   ├── GuestPoweredOff     the guest ended itself
    │   └── VMMDied             QEMU ended, or was killed, on the host
    └── LimitExceeded           a policy did its work
        ├── MemoryLimitExceeded
        ├── CellTimeLimitExceeded
        ├── IdleTimeLimitExceeded
        ├── LifetimeLimitExceeded
        └── MessageSizeLimitExceeded

Each message is one sentence that names the thing, the limit and the fix; it reaches Jupyter's users
verbatim. What ends a kernel is told by the name of its class, too (death.py).
"""

from __future__ import annotations


class SandboxKernelError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigurationError(SandboxKernelError):
    """The user, the kernelspec or the administrator asked for something that is not allowed."""


class VolumeBusy(ConfigurationError):
    """A volume is attached to a kernel, and cannot be to another one in that way, or be removed."""


class HostError(SandboxKernelError):
    """The host lacks something that the VM needs."""


class MissingToolError(HostError):
    """A program that has to be installed is not."""


class AcceleratorError(HostError):
    """The accelerator asked for cannot run a guest on this machine."""


class ImageError(HostError):
    """A guest image is missing, damaged or could not be built."""


class NoSpaceError(HostError):
    """A file system of the host is full."""


class NetworkError(HostError):
    """A VM's network cannot be had on this host, or has ended by itself."""


class HostShuttingDown(HostError):
    """Somebody on the host has asked the VM to end: its shutdown, or whoever administers it."""


class TemplateError(HostError):
    """A template cannot be made or restored; a kernel can do without."""


class TemplateUnsafeError(TemplateError):
    """A template cannot be restored here without its clones being able to write to it; it is good."""


class GuestError(SandboxKernelError):
    """The VM did not do its part."""


class GuestProtocolError(GuestError):
    """The guest broke a protocol (virtqueue, vsock, agent, ZMTP); its VM must end."""


class BootError(GuestError):
    """The guest did not come up before its deadline."""


class KernelStartError(GuestError):
    """The guest is up, but the kernel's command could not be started or ended at once."""


class MountError(GuestError):
    """A directory of the host could not be mounted in the guest."""


class VolumeError(GuestError):
    """A volume could not be attached to the VM, or mounted in the guest."""


class KernelExited(GuestError):
    """The kernel's process ended, or was ended by a signal that is meant to end processes."""


class KernelCrashed(GuestError):
    """The kernel's process was ended by a signal that tells of a fault, as SIGSEGV does."""


class GuestPanicked(GuestError):
    """The guest's Linux panicked."""


class GuestPoweredOff(GuestError):
    """The guest ended its machine by itself."""


class VMMDied(GuestError):
    """QEMU ended, or was killed."""


class LimitExceeded(SandboxKernelError):
    """A limit that the user or administrator set was reached.

    Attributes:
        limit: the limit, in `unit`.
        peak: the most that was seen of it; None where there is no such figure.
        unit: MiB, s, …
    """

    def __init__(self, message: str, limit: float = 0, unit: str = "", peak: float | None = None) -> None:
        super().__init__(message)
        self.limit, self.unit, self.peak = limit, unit, peak


class MemoryLimitExceeded(LimitExceeded):
    """The kernel wanted more memory than its VM has."""


class CellTimeLimitExceeded(LimitExceeded):
    """A cell ran for longer than one may, and an interrupt did not end it."""


class IdleTimeLimitExceeded(LimitExceeded):
    """Nobody has used the kernel for longer than one may stay idle."""


class LifetimeLimitExceeded(LimitExceeded):
    """The kernel is older than one may become."""


class MessageSizeLimitExceeded(LimitExceeded):
    """The kernel sent a message that is larger than one may be."""
