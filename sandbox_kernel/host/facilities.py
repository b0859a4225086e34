"""What the host's kernel, its administrator and its disk must grant, each found out by trying it."""

from __future__ import annotations

import os
import platform
import pwd
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import HostError
from sandbox_kernel.host.finding import Finding
from sandbox_kernel.image import tool
from sandbox_kernel.image.build import SPACE
from sandbox_kernel.image.system import require_subordinate_ids
from sandbox_kernel.jail import cgroup
from sandbox_kernel.vsock import reservation

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_KEYRING_PLACES = (
    KEYRING,
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
    Path("/etc/apt/trusted.gpg.d"),
)
_MEMORY = 1536
"""MiB that the default VM takes with everything around it."""
_APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_CLONE = Path("/proc/sys/kernel/unprivileged_userns_clone")
_TUN = "/dev/net/tun"


def processor() -> Finding:
    """The guest's kernel is built for x86-64, and so must be the host's for now."""
    found = platform.machine()
    return Finding("x86-64 processor", found in ("x86_64", "AMD64"), True, found, "use an x86-64 machine")


def keyring() -> Finding:
    """The keys by which packages of the guest's Debian are checked."""
    places = [place for place in _KEYRING_PLACES[:2] if place.exists()]
    places += [place for place in _KEYRING_PLACES[2:] if any(place.glob("debian-archive-*"))]
    name, fix = (
        "Debian's archive keys (check the guest's packages)",
        "install the package debian-archive-keyring",
    )
    if places:
        return Finding(name, True, True, "installed")
    return Finding(name, False, True, "missing", fix, ("debian-archive-keyring",))


def user_namespaces() -> Finding:
    """The jail around QEMU is made of them."""
    name = "user namespaces (jail)"
    try:
        jailed = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--", "/bin/true"]
        tool.run(jailed, purpose="Making a user namespace")
    except HostError as error:
        return Finding(name, False, True, str(error), _allow_namespaces())
    return Finding(name, True, True, "usable")


def subordinate_ids() -> Finding:
    """What a user's mmdebstrap takes; root's does without."""
    name = "subordinate ids (lets a user build images)"
    if os.getuid() == 0:
        return Finding(name, True, False, "not needed by root")
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        require_subordinate_ids(os.getuid(), user)
    except HostError:
        fix = f"run `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
        return Finding(name, False, True, f"user {user} has none", fix)
    return Finding(name, True, True, "granted")


def vhost_vsock() -> Finding:
    """Faster vsock by the host's kernel; the supervisor does without it."""
    missing = reservation.unavailable()
    fix = "run `sudo modprobe vhost_vsock` and let the user open /dev/vhost-vsock; without it vsock is slower"
    return Finding(
        "/dev/vhost-vsock (faster channels)", not missing, False, missing or "usable", fix if missing else ""
    )


def tap() -> Finding:
    """The device by which VMs get a network; kernels without one do without it."""
    fix = f"run `sudo modprobe tun` and let the user open {_TUN} (mode 0666, as udev has it)"
    name = f"{_TUN} (kernels with a network)"
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(name, False, False, str(error.strerror), fix)
    return Finding(name, True, False, "usable")


def control_group() -> Finding:
    """A bound on QEMU's own memory."""
    name = "control group (bounds QEMU itself, and `cpu_quota`)"
    group = cgroup.create(f"doctor-{os.getpid()}", cgroup.Bounds(64, 1, 1.0))
    for folder in group.folders:
        folder.rmdir()
    if not group.missing:
        return Finding(name, True, False, f"writable, {len(group.folders)} folder(s) a VM")
    fix = (
        "start the client by the user's systemd (`systemd-run --user --scope jupyter lab`), which has a part "
        "of cgroup v2; the VM's memory and processors are bounded anyway"
    )
    reasons = "; ".join(f"{controller}: {reason}" for controller, reason in group.missing.items())
    return Finding(name, False, False, f"not all limits are enforced here ({reasons})", fix)


def disk() -> Finding:
    """Room for images."""
    folder = paths.data_dir()
    free = tool.free_space(folder)
    found = f"{free / 1e9:.1f} GB free on {tool.mount_point(folder)}"
    fix = f"free {SPACE / 1e9:.1f} GB there or set XDG_DATA_HOME to another disk"
    return Finding(
        "disk space (building an image)", free >= SPACE, False, found, "" if free >= SPACE else fix
    )


def memory() -> Finding:
    """Room for one VM of the default size."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) // 1024
    fix = "end something else or configure a smaller `memory`"
    enough = available >= _MEMORY
    return Finding("memory (one VM)", enough, False, f"{available} MiB available", "" if enough else fix)


def _allow_namespaces() -> str:
    for file, wanted in ((_CLONE, "1"), (_APPARMOR, "0")):
        try:
            if file.read_text().strip() != wanted:
                return (
                    f"run `sudo sysctl {file.relative_to('/proc/sys').as_posix().replace('/', '.')}={wanted}`"
                )
        except OSError:
            continue
    return (
        "let unprivileged users make namespaces (sysctl user.max_user_namespaces, or the container's policy)"
    )
