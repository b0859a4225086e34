"""Every error this package raises, sorted by whose fault it is.

    SandboxKernelError
    ├── ConfigurationError      the user asked for something that is not allowed
    ├── HostError               this machine lacks something: a tool, space, a device, an image
    │   ├── MissingToolError
    │   ├── AcceleratorError
    │   ├── ImageError
    │   ├── NoSpaceError
    │   └── TemplateError       a saved VM cannot be made or restored; kernels boot instead
    │       └── TemplateUnsafeError  it is good, but could not be protected from what is restored from it
    ├── GuestError              the VM did not do its part
    │   ├── GuestProtocolError  it broke a protocol and is not to be trusted any more
    │   ├── BootError           it did not come up in time
    │   └── KernelStartError    it came up, the kernel's command did not
    └── LimitExceeded           a policy did its work

Each message is one sentence that names the thing, the limit and the fix; it reaches Jupyter's users
verbatim.
"""

from __future__ import annotations


class SandboxKernelError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigurationError(SandboxKernelError):
    """The user, the kernelspec or the administrator asked for something that is not allowed."""


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


class LimitExceeded(SandboxKernelError):
    """A limit that the user or administrator set was reached."""
