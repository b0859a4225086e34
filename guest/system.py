"""The system calls that Python has no function for, and what PID 1 does with them once, at boot."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_PR_SET_NO_NEW_PRIVS = 38
_RB_AUTOBOOT = 0x01234567

MOUNTS = (
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m"),
    ("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
"""What the initramfs has not mounted: source, target, type, flags, options (mount(2))."""


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount_all() -> None:
    """Mounts everything in `MOUNTS`."""
    for source, target, kind, flags, options in MOUNTS:
        os.makedirs(target, exist_ok=True)
        result = _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
        )
        _check(result, target)
    for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(f"/proc/self/fd{number}", f"/dev/{name}")


def loopback_up() -> None:
    """Brings `lo` up (netdevice(7)); debugpy and much user code count on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def add_entropy(data: bytes) -> None:
    """Credits `data` to the kernel's generator and reseeds it (random(4))."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def no_new_privileges() -> None:
    """No program that this process runs can gain rights by set-user-id (prctl(2))."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def act_as(uid: int, gid: int) -> None:
    """Has this thread's file accesses checked as this user's (setfsuid(2)); 0, 0 takes it back."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


def reboot() -> None:
    """Ends the machine: QEMU, told not to reboot, exits."""
    os.sync()
    _libc.reboot(_RB_AUTOBOOT)
