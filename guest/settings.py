"""What the agent takes for given: the kernel's user, and where things lie. Decided once, passed down whole.

The defaults are the guest's. On the host the unit tests run the same programs with another user, without
cgroups, and with Unix sockets in the place of vsock ports.
"""

from __future__ import annotations


class Settings:
    """Read-only. (No dataclass: importing that module takes emulated guests 0.1 s.)

    Attributes:
        uid, gid: numeric ids of the kernel's user.
        user: its name.
        home: its home, where the kernel and programs start.
        run: private folder for the connection file and the kernel's own sockets, made by `start`.
        cgroups: folder of the cgroup file system (v2); empty: none are used.
        sockets: folder for Unix sockets named by port; empty: vsock ports.
        python: what a kernel's `python` means here.
        launcher: path of the program that starts an ipykernel.
    """

    __slots__ = ("cgroups", "gid", "home", "launcher", "python", "run", "sockets", "uid", "user")
    uid: int
    gid: int
    user: str
    home: str
    run: str
    cgroups: str
    sockets: str
    python: str
    launcher: str

    def __init__(
        self,
        uid: int = 1000,
        gid: int = 1000,
        user: str = "sandbox",
        home: str = "/home/sandbox",
        run: str = "/run/sandbox-kernel",
        cgroups: str = "/sys/fs/cgroup",
        sockets: str = "",
        python: str = "/usr/bin/python3",
        launcher: str = "/usr/lib/sandbox-kernel/kernel.py",
    ) -> None:
        given = locals()
        for name in self.__slots__:
            object.__setattr__(self, name, given[name])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: settings are not changed")

    @property
    def kernel_cgroup(self) -> str:
        """Folder of the cgroup of the kernel and of what runs as its user; empty without cgroups."""
        return self.cgroups and f"{self.cgroups}/kernel"

    @property
    def root_cgroup(self) -> str:
        """Folder of the cgroup of programs that the host runs as root; empty without cgroups."""
        return self.cgroups and f"{self.cgroups}/programs"

    def environment(self) -> dict[str, str]:
        """What every program of the kernel's user gets, before what the host adds."""
        return {
            "HOME": self.home,
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": "/bin/bash",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
        }
