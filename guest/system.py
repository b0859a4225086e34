"""The system calls that Python has no function for, and what PID 1 sets once, at boot."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 1024, 4096
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_PR_SET_NO_NEW_PRIVS = 38
_RB_AUTOBOOT = 0x01234567
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_RANDOM = "/dev/urandom"
_MACHINE_ID = "/etc/machine-id"
_BOOT_ID = "/run/boot_id"
_BOOT_ID_OF_LINUX = b"/proc/sys/kernel/random/boot_id"
_OPEN_FILES = (1024, 524288)
_open: dict[str, int] = {}

MOUNTS = (
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
"""What the initramfs has not mounted: source, target, type, flags, options (mount(2))."""

SYSCTLS = (
    # What systemd sets on an ordinary Debian: links and FIFOs of others in /tmp are no traps.
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "2"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    # Of a network device: addresses come from the host, are nowhere else, and are to be usable at once.
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
    # `ping` without privileges.
    ("net/ipv4/ping_group_range", "0 2147483647"),
)
"""Names under /proc/sys and values. One that this guest's kernel does not have is passed over."""


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def write(path: str, content: str) -> None:
    """Writes a kernel's file (procfs, cgroup) in one system call, as those want it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def read(path: str) -> str:
    """The text of a kernel's file, at most 64 KiB."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def mount_all() -> None:
    """Mounts everything in `MOUNTS`, and makes the links of /dev that programs expect."""
    for source, target, kind, flags, options in MOUNTS:
        os.makedirs(target, exist_ok=True)
        mount(source, target, kind, flags, options)
    for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(f"/proc/self/fd{number}", f"/dev/{name}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, target)


def unmount(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target.encode(), flags), target)


def set_sysctls() -> None:
    """Sets everything in `SYSCTLS`."""
    for name, value in SYSCTLS:
        try:
            write(f"/proc/sys/{name}", value)
        except FileNotFoundError:
            continue


def loopback_up() -> None:
    """Brings `lo` up (netdevice(7)); debugpy and much user code count on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def stay_in_memory() -> None:
    """Keeps every page that this process touches from now on in RAM (mlockall(2)).

    Else a guest whose memory is used up drops the agent's code and reads it from disk again for each request.
    """
    _check(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT), "mlockall")


def add_entropy(data: bytes) -> None:
    """Credits `data` to the kernel's generator and reseeds it (random(4))."""
    device = _kept(_RANDOM)
    fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
    fcntl.ioctl(device, _RNDRESEEDCRNG)


def lay_identity() -> None:
    """Makes this machine's ids replaceable by `new_identity` without a path, and replaces them a first time.

    Linux makes its boot id once and has no way to change it, so another file is laid over it.
    """
    for path in (_MACHINE_ID, _BOOT_ID):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444))
    _kept(_RANDOM)
    new_identity()
    _check(_libc.mount(_BOOT_ID.encode(), _BOOT_ID_OF_LINUX, None, ctypes.c_ulong(MS_BIND), None), _BOOT_ID)


def new_identity() -> None:
    """Gives this machine ids of its own: it began as another one's copy, where `lay_identity` was called."""
    os.pwrite(_kept(_MACHINE_ID), f"{os.urandom(16).hex()}\n".encode(), 0)
    random = bytearray(os.urandom(16))
    random[6], random[8] = random[6] & 0x0F | 0x40, random[8] & 0x3F | 0x80  # RFC 9562, section 5.4
    text = random.hex()
    boot_id = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) + "\n"
    os.pwrite(_kept(_BOOT_ID), boot_id.encode(), 0)


def _kept(path: str) -> int:
    """A descriptor that writes to a file, opened once: a template has opened what a clone writes to."""
    if path not in _open:
        _open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    return _open[path]


def set_limits() -> None:
    """The limits of a usual session (setrlimit(2)), for what this process becomes.

    Descriptors: 1024, since `select` knows no more, to be raised by who wants more. Processes: as many as the
    cgroup allows; Linux' own default depends on the size of the RAM.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def no_new_privileges() -> None:
    """No program that this process runs can gain rights by set-user-id (prctl(2))."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def act_as(uid: int, gid: int) -> None:
    """Has this thread's file accesses checked as this user's (setfsuid(2), per thread); 0, 0 takes it back.

    Leaving 0 also takes the capabilities away that pass over file permissions (capabilities(7)).
    """
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


def uptime() -> float:
    """Seconds since the guest was switched on."""
    return float(read("/proc/uptime").split()[0])


def reboot() -> None:
    """Ends the machine: QEMU, told not to reboot, exits. Without ACPI there is no other way to say so.

    Nothing is synced and nobody is asked to end: the root is in memory and goes with it.
    """
    _libc.reboot(_RB_AUTOBOOT)
