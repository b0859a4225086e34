"""The command line of QEMU, as a pure function of what the machine is to be.

The machine is `pc` with the guest's ACPI off: it calibrates its clock by itself (with `microvm` under TCG
that takes command-line constants of the host's clock), boots as fast, and can take a PCI device after a
restore, which `microvm` cannot. Devices are reduced to what is used: a read-only disk, an entropy source, a
serial console, vsock. There is no display, no USB, no default device of any kind, and no network device but
one that is there where a policy asks for it.

Everything QEMU talks to arrives as an inherited descriptor (QMP, console, vsock), so that no socket of a VM
lies in the file system.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

TRANSLATION_CACHE = {"small": 32, "large": 128}
"""MiB of TCG's translation cache (`tb-size`) under and from 512 MiB of RAM."""

_VECTORS = 4
"""Interrupts of a vsock device: three queues and the configuration. With fewer the driver tries twice."""

NIC = "nic"
"""The network device, its other end, and that one's descriptor, each in a name space of its own."""
_NIC_SLOT = "0x10"
"""Its place on the PCI bus, the same in a template and in its clones, and none that anything else gets."""
_GROUP = "disks"
"""QEMU's name for the limits that all disks of a VM have together."""

_ERRORS = {"werror": "report", "rerror": "report"}
"""What the host cannot do is told to the guest; by default QEMU would stop the machine and wait for room."""

_FD_SET = 1
"""QEMU's number for the scratch disk's descriptor (qemu(1), -add-fd)."""

_VOLUME_FD_SETS = 2
"""The first of those of volumes, which are plugged in later."""

READ_ONLY_RAM = (8, 2)
"""Version of QEMU that can be told to open the file of private RAM for reading (`rom=off`)."""

EMULATED_CPU = "max,la57=off,smap=off,smep=off,umip=off,pku=off"
"""The CPU under TCG: all that it can emulate, but for what costs a fifteenth of a start and is of no use.

`la57` makes page tables a level deeper. The others protect the guest's kernel from its own processes; what
protects the host is the VM (see `KERNEL_ARGUMENTS`), and each change of SMAP's flag ends a block of code.
"""

KERNEL_ARGUMENTS = (
    "console=ttyS0",
    # A clone has for itself what it writes to: 4 KiB of new memory must not become 2 MiB of zeros. What asks
    # for huge pages, as NumPy does for large arrays, gets them.
    "transparent_hugepage=madvise",
    "quiet",
    "panic=-1",
    "reboot=t",
    "acpi=off",
    # The boundary is the VM, not the guest's own kernel; software mitigations inside it only cost time.
    "mitigations=off",
    # Entropy comes from the host (virtio-rng); no need to wait for interrupts to collect it.
    "random.trust_bootloader=on",
    # Accounts of who waits for what, which nobody reads here, kept at every change of task.
    "psi=0",
    # One clock watching the other, in every idle guest, for faults of multi-socket hardware.
    "tsc=nowatchdog",
)


@dataclass(frozen=True)
class VsockDevice:
    """The guest's vsock: `fd` of a vhost-user socket, or of an open /dev/vhost-vsock with a CID."""

    fd: int
    kernel_cid: int | None = None


@dataclass(frozen=True)
class NetworkDevice:
    """The guest's network device: `fd` of its tap, and its address."""

    fd: int
    mac: str


@dataclass(frozen=True)
class Disks:
    """The VM's disks beside the image's.

    Attributes:
        scratch_fd: inherited descriptor of the scratch disk's file; None for none.
        bandwidth: bytes a second, all disks together; 0: any number.
        iops: reads and writes a second, all disks together; 0: any number.
    """

    scratch_fd: int | None = None
    bandwidth: int = 0
    iops: int = 0

    @property
    def throttle(self) -> dict[str, int]:
        """QEMU's limits, by its names (qapi/block-core.json, ThrottleLimits)."""
        limits = {"bps-total": self.bandwidth, "iops-total": self.iops}
        return {name: value for name, value in limits.items() if value}


NO_DISKS = Disks()
"""No disk but the image's, and no limits."""


@dataclass(frozen=True)
class TemplateRam:
    """Guest RAM in a template's file.

    Attributes:
        file: its path as seen in the jail.
        private: writes stay with this QEMU, which waits for the devices' state (a clone); otherwise they go
            into the file (the template's maker).
        read_only: QEMU is told to open the file for reading, for private RAM from version `READ_ONLY_RAM` on.
    """

    file: PurePosixPath
    private: bool
    read_only: bool = False


@dataclass(frozen=True)
class QemuConfig:
    """What QEMU is told.

    Attributes:
        binary: path of QEMU as seen in its jail.
        image: folder with vmlinux, initrd and root.erofs as seen in its jail.
        memory: RAM in MiB.
        vcpus: virtual CPUs.
        accelerator: `kvm` or `tcg`.
        console_fd: inherited stream socket that gets the serial console.
        qmp_fd: inherited stream socket for QMP; None for a machine nobody talks to.
        script_fd: inherited stream socket for a second QMP, whose commands lie there before QEMU runs.
        vsock: the vsock device; None for a machine without.
        nic: the network device, for a template's maker; None for a machine without, or that gets it later.
        template: where the RAM lies; None for a machine that boots and is not to be saved. With a template
            the vsock device is prepared but not plugged in (`vsock_device`), as it cannot be saved.
        kernel_arguments: words for the guest kernel's command line beside `KERNEL_ARGUMENTS`.
        disks: scratch disk and limits. With private RAM the disk is prepared but not plugged in
            (`scratch_device`).
    """

    binary: PurePosixPath
    image: PurePosixPath
    memory: int
    vcpus: int
    accelerator: str
    console_fd: int
    qmp_fd: int | None = None
    script_fd: int | None = None
    vsock: VsockDevice | None = None
    nic: NetworkDevice | None = None
    kernel_arguments: tuple[str, ...] = ()
    template: TemplateRam | None = None
    disks: Disks = NO_DISKS


def command_line(config: QemuConfig) -> list[str]:
    """QEMU's argv for `config` (qemu-system-x86_64(1), QEMU 7.2 or later)."""
    argv = [
        str(config.binary),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-vga", "none"),
        *("-machine", "pc,usb=off,vmport=off,memory-backend=ram"),
        *_accelerator(config),
        *("-smp", str(config.vcpus)),
        *("-m", f"{config.memory}M"),
        *("-object", _ram(config)),
        *_boot(config),
        *("-chardev", f"socket,id=console,fd={config.console_fd}", "-serial", "chardev:console"),
        *_disks(config),
        *("-device", "virtio-rng-pci"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]
    if config.qmp_fd is not None:
        argv += ["-chardev", f"socket,id=qmp,fd={config.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    if config.vsock is not None:
        if config.vsock.kernel_cid is None:
            argv += ["-chardev", f"socket,id=vsock,fd={config.vsock.fd}"]
        if config.template is None:
            argv += ["-device", _words(vsock_device(config.vsock))]
    if config.nic is not None:
        argv += ["-netdev", _words(nic_backend(str(config.nic.fd)).items())]
        argv += ["-device", _words(nic_device(config.nic.mac))]
    if config.template is not None and config.template.private:
        argv += ["-incoming", "defer"]
    if config.script_fd is not None:
        argv += ["-chardev", f"socket,id=script,fd={config.script_fd}", "-mon", "chardev=script,mode=control"]
    return argv


def vsock_device(device: VsockDevice) -> list[tuple[str, str | int]]:
    """The vsock device's driver and properties, for the command line or for `device_add`."""
    if device.kernel_cid is not None:
        return [
            ("driver", "vhost-vsock-pci"),
            ("guest-cid", device.kernel_cid),
            ("vhostfd", str(device.fd)),
            ("vectors", _VECTORS),
        ]
    return [("driver", "vhost-user-vsock-pci"), ("chardev", "vsock"), ("vectors", _VECTORS)]


def nic_backend(fd: str = NIC) -> dict[str, str]:
    """The host's end of the network device, for the command line or for `netdev_add`.

    Args:
        fd: the tap's descriptor: its number, or the name by which QEMU has been given it.
    """
    return {"type": "tap", "id": NIC, "fd": fd}


def nic_device(mac: str) -> list[tuple[str, str | int]]:
    """The network device's driver and properties, for the command line or for `device_add`.

    No program to boot from is with it, and after a restore it has nothing to announce.
    """
    return [
        ("driver", "virtio-net-pci"),
        ("netdev", NIC),
        ("mac", mac),
        ("romfile", ""),
        ("mq", False),
        ("ctrl_mac_addr", False),
        ("guest_announce", False),
        ("addr", _NIC_SLOT),
    ]


def scratch_device(disks: Disks) -> list[tuple[str, str | int]]:
    """The scratch disk's driver and properties, for the command line or for `device_add`."""
    drive = "scratch-throttled" if disks.throttle else "scratch"
    return [("driver", "virtio-blk-pci"), ("drive", drive), *_ERRORS.items()]


def plug_in_volume(number: int, writable: bool, throttled: bool) -> list[tuple[str, dict[str, Any]]]:
    """QMP's commands that plug a volume into a VM that runs, after its descriptor has been sent.

    No lock of QEMU's own is taken, which would be one on the same open file as the supervisor's.

    Args:
        number: of this volume in its VM, from 0.
        writable: whether QEMU, and so the guest, may write to it; else the descriptor is for reading.
        throttled: whether the VM's disks have limits, which then hold for this one, too.
    """
    fd_set, name = _VOLUME_FD_SETS + number, volume_name(number)
    shared: dict[str, Any] = {"read-only": not writable}
    if writable:
        shared["discard"] = "unmap"
    file = {"driver": "file", "node-name": name, "filename": f"/dev/fdset/{fd_set}", "locking": "off"}
    commands: list[tuple[str, dict[str, Any]]] = [
        ("add-fd", {"fdset-id": fd_set}),
        ("blockdev-add", file | shared),
    ]
    drive = name
    if throttled:
        drive = f"{name}-throttled"
        throttle = {"driver": "throttle", "node-name": drive, "throttle-group": _GROUP, "file": name}
        commands.append(("blockdev-add", throttle | shared))
    device = {"driver": "virtio-blk-pci", "id": name, "serial": name, "drive": drive}
    return [*commands, ("device_add", device | _ERRORS)]


def volume_name(number: int) -> str:
    """The serial number of the disk, by which the guest knows it, and the beginning of its names in QEMU."""
    return f"volume-{number}"


def _words(properties: Iterable[tuple[str, str | int]]) -> str:
    """Properties as the command line has them; `device_add` of QEMU 10 wants its own types."""
    words = {True: "on", False: "off"}
    return ",".join(
        f"{name}={words[value] if isinstance(value, bool) else value}" for name, value in properties
    )


def _disks(config: QemuConfig) -> list[str]:
    disks = config.disks
    nodes = {"root": f"driver=file,node-name=root,filename={config.image / 'root.erofs'},read-only=on"}
    argv = []
    if disks.scratch_fd is not None:
        argv += ["-add-fd", f"fd={disks.scratch_fd},set={_FD_SET}"]
        nodes["scratch"] = f"driver=file,node-name=scratch,filename=/dev/fdset/{_FD_SET},discard=unmap"
    if disks.throttle:
        group = {"qom-type": "throttle-group", "id": _GROUP, "limits": disks.throttle}
        argv += ["-object", json.dumps(group)]
    for name, node in nodes.items():
        argv += ["-blockdev", node]
        if disks.throttle:
            how = f"driver=throttle,node-name={name}-throttled,throttle-group={_GROUP},file={name}"
            argv += ["-blockdev", how + (",read-only=on" if name == "root" else "")]
    argv += ["-device", f"virtio-blk-pci,drive=root{'-throttled' if disks.throttle else ''}"]
    if disks.scratch_fd is not None and not (config.template is not None and config.template.private):
        argv += ["-device", _words(scratch_device(disks))]
    return argv


def _boot(config: QemuConfig) -> list[str]:
    """What the firmware boots; nothing for a clone, whose RAM has it: it would be read, and kept, in vain."""
    if config.template is not None and config.template.private:
        return []
    return [
        *("-kernel", str(config.image / "vmlinux")),
        *("-initrd", str(config.image / "initrd")),
        *("-append", " ".join(KERNEL_ARGUMENTS + config.kernel_arguments)),
    ]


def _ram(config: QemuConfig) -> str:
    if config.template is None:
        # share=on lets the vhost-user device map it; sealed, so that nobody can shrink it under the device.
        return f"memory-backend-memfd,id=ram,size={config.memory}M,share=on,seal=on"
    share = "off" if config.template.private else "on"
    how = f"share={share},readonly=on,rom=off" if config.template.read_only else f"share={share}"
    return f"memory-backend-file,id=ram,size={config.memory}M,mem-path={config.template.file},{how}"


def _accelerator(config: QemuConfig) -> list[str]:
    if config.accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    cache = TRANSLATION_CACHE["small" if config.memory < 512 else "large"]
    return ["-accel", f"tcg,thread=multi,tb-size={cache}", "-cpu", EMULATED_CPU]
