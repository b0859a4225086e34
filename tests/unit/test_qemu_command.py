"""QEMU's command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePosixPath

import pytest

from sandbox_kernel.qemu.command import (
    Disks,
    NetworkDevice,
    QemuConfig,
    TemplateRam,
    VsockDevice,
    command_line,
    nic_device,
    plug_in_volume,
)

RAM = PurePosixPath("/ram")
CONFIG = QemuConfig(PurePosixPath("/usr/bin/qemu-system-x86_64"), PurePosixPath("/image"), 512, 2, "tcg", 7)


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def test_there_is_no_default_device_and_no_network() -> None:
    argv = command_line(CONFIG)
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert not {"-net", "-netdev", "-nic"} & set(argv)
    assert values(argv, "-device") == ["virtio-blk-pci,drive=root", "virtio-rng-pci"]


def test_the_image_is_opened_read_only() -> None:
    assert values(command_line(CONFIG), "-blockdev") == [
        "driver=file,node-name=root,filename=/image/root.erofs,read-only=on"
    ]


def test_a_scratch_disk_is_a_descriptor_and_tells_the_guest_of_a_full_host() -> None:
    argv = command_line(dataclasses.replace(CONFIG, disks=Disks(scratch_fd=12)))
    assert values(argv, "-add-fd") == ["fd=12,set=1"]
    assert values(argv, "-blockdev")[1] == (
        "driver=file,node-name=scratch,filename=/dev/fdset/1,discard=unmap"
    )
    assert values(argv, "-device")[1] == ("driver=virtio-blk-pci,drive=scratch,werror=report,rerror=report")


def test_a_clones_scratch_disk_is_prepared_and_plugged_in_later() -> None:
    clone = dataclasses.replace(CONFIG, disks=Disks(scratch_fd=12), template=TemplateRam(RAM, private=True))
    argv = command_line(clone)
    assert len(values(argv, "-blockdev")) == 2
    assert values(argv, "-device") == ["virtio-blk-pci,drive=root", "virtio-rng-pci"]


def test_all_disks_together_keep_to_the_limits() -> None:
    disks = Disks(scratch_fd=12, bandwidth=1 << 20, iops=100)
    argv = command_line(dataclasses.replace(CONFIG, disks=disks))
    assert json.loads(values(argv, "-object")[1]) == {
        "qom-type": "throttle-group",
        "id": "disks",
        "limits": {"bps-total": 1 << 20, "iops-total": 100},
    }
    throttled = [node for node in values(argv, "-blockdev") if node.startswith("driver=throttle")]
    assert throttled == [
        "driver=throttle,node-name=root-throttled,throttle-group=disks,file=root,read-only=on",
        "driver=throttle,node-name=scratch-throttled,throttle-group=disks,file=scratch",
    ]
    assert [device.split(",")[1] for device in values(argv, "-device")[:2]] == [
        "drive=root-throttled",
        "drive=scratch-throttled",
    ]


def test_seccomp_is_on_with_every_denial() -> None:
    assert values(command_line(CONFIG), "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]


def test_the_guests_memory_cannot_be_shrunk_under_the_device() -> None:
    assert values(command_line(CONFIG), "-object") == [
        "memory-backend-memfd,id=ram,size=512M,share=on,seal=on"
    ]


@pytest.mark.parametrize(
    ("ram", "how"),
    [
        (TemplateRam(RAM, private=False), "share=on"),
        (TemplateRam(RAM, private=True), "share=off"),
        (TemplateRam(RAM, private=True, read_only=True), "share=off,readonly=on,rom=off"),
    ],
)
def test_a_templates_ram_is_shared_by_its_maker_and_private_to_a_clone(ram: TemplateRam, how: str) -> None:
    argv = command_line(dataclasses.replace(CONFIG, template=ram))
    assert values(argv, "-object") == [f"memory-backend-file,id=ram,size=512M,mem-path=/ram,{how}"]
    assert values(argv, "-incoming") == (["defer"] if ram.private else [])


def test_a_clone_does_not_read_the_kernel_that_it_has_in_its_ram() -> None:
    boots = {"-kernel", "-initrd", "-append"}
    assert boots <= set(command_line(CONFIG))
    assert boots <= set(command_line(dataclasses.replace(CONFIG, template=TemplateRam(RAM, private=False))))
    assert not boots & set(command_line(dataclasses.replace(CONFIG, template=TemplateRam(RAM, private=True))))


def test_the_accelerator_is_the_one_chosen_and_no_other() -> None:
    kvm = dataclasses.replace(CONFIG, accelerator="kvm")
    assert values(command_line(kvm), "-accel") == ["kvm"]
    assert values(command_line(kvm), "-cpu") == ["host"]
    assert values(command_line(CONFIG), "-accel")[0].startswith("tcg,")


def test_each_vsock_is_a_device_of_its_own_kind() -> None:
    userspace = dataclasses.replace(CONFIG, vsock=VsockDevice(9))
    kernel = dataclasses.replace(CONFIG, vsock=VsockDevice(9, kernel_cid=77))
    assert (
        values(command_line(userspace), "-device")[-1]
        == "driver=vhost-user-vsock-pci,chardev=vsock,vectors=4"
    )
    assert "socket,id=vsock,fd=9" in values(command_line(userspace), "-chardev")
    assert (
        values(command_line(kernel), "-device")[-1]
        == "driver=vhost-vsock-pci,guest-cid=77,vhostfd=9,vectors=4"
    )


def test_a_template_with_a_network_has_the_device_in_the_place_that_its_clones_plug_it_into() -> None:
    argv = command_line(dataclasses.replace(CONFIG, nic=NetworkDevice(9, "02:00:00:00:00:07")))
    assert "type=tap,id=nic,fd=9" in argv
    [device] = [word for word in argv if word.startswith("driver=virtio-net-pci")]
    assert device == (
        "driver=virtio-net-pci,netdev=nic,mac=02:00:00:00:00:07,romfile=,"
        "mq=off,ctrl_mac_addr=off,guest_announce=off,addr=0x10"
    )
    plugged_in = dict(nic_device("02:00:00:00:00:07"))
    assert (plugged_in["mq"], plugged_in["addr"]) == (False, "0x10"), "QEMU 10 takes no words for these"


def test_a_machine_nobody_talks_to_has_no_qmp() -> None:
    assert values(command_line(CONFIG), "-mon") == []
    assert values(command_line(dataclasses.replace(CONFIG, qmp_fd=5)), "-mon") == ["chardev=qmp,mode=control"]


def test_a_volume_is_a_descriptor_that_is_sent_and_read_only_unless_it_is_to_be_written() -> None:
    assert plug_in_volume(0, False, False) == [
        ("add-fd", {"fdset-id": 2}),
        (
            "blockdev-add",
            {
                "driver": "file",
                "node-name": "volume-0",
                "filename": "/dev/fdset/2",
                "locking": "off",
                "read-only": True,
            },
        ),
        (
            "device_add",
            {
                "driver": "virtio-blk-pci",
                "id": "volume-0",
                "serial": "volume-0",
                "drive": "volume-0",
                "werror": "report",
                "rerror": "report",
            },
        ),
    ]
    [_, (_, node), _] = plug_in_volume(7, True, False)
    assert (node["filename"], node["read-only"], node["discard"]) == ("/dev/fdset/9", False, "unmap")


def test_a_volume_keeps_to_the_limits_of_all_disks() -> None:
    argv = command_line(dataclasses.replace(CONFIG, disks=Disks(iops=7)))
    [group] = [json.loads(text) for text in values(argv, "-object") if "throttle-group" in text]
    [_, _, (command, node), (_, device)] = plug_in_volume(1, True, True)
    assert (command, node["throttle-group"], node["file"]) == ("blockdev-add", group["id"], "volume-1")
    assert (node["read-only"], node["discard"]) == (False, "unmap")
    assert device["drive"] == node["node-name"] == "volume-1-throttled"
    assert len(device["serial"]) <= 20
