"""The userspace vsock device with a real QEMU and a real Linux guest, nothing else around it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
from qemu.qmp import QMPClient

from sandbox_kernel.image.store import Image
from sandbox_kernel.machine.accelerator import settle
from sandbox_kernel.qemu.command import QemuConfig, VsockDevice, command_line
from sandbox_kernel.vsock.userspace import UserspaceVsock
from tests.vm import vsock_guest

READY = 60.0
"""Seconds for a guest under software emulation on a busy machine; a deadline, not a measurement."""

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
while read -r module; do $b insmod /modules/$module.ko; done </modules/order
$b mount -t erofs -o ro /dev/vda /root
program=$($b cat /vsock_guest.py)
exec $b switch_root /root /usr/bin/python3 -I -S -c "$program" >/dev/console 2>&1
"""


def archive(files: dict[str, bytes]) -> bytes:
    """An initramfs of executable files (Linux's driver-api/early-userspace/buffer-format.rst)."""
    data = b""
    for number, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")]):
        fields = (number, 0o100755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        data += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        data += bytes(-len(data) % 4) + content
        data += bytes(-len(data) % 4)
    return data


@dataclass
class Guest:
    host: UserspaceVsock
    console: asyncio.StreamReader
    qmp: QMPClient

    async def line(self, beginning: str) -> str:
        """The next line of the console that begins like this."""
        async with asyncio.timeout(READY):
            while line := await self.console.readline():
                if line.startswith(beginning.encode()):
                    return line.decode().strip()
        raise AssertionError(f"the guest ended without saying {beginning}")


def prepare(image: Image, folder: Path) -> None:
    """A folder like the image's, whose initramfs starts vsock_guest.py."""
    (folder / "vmlinux").symlink_to(image.vmlinux)
    (folder / "root.erofs").symlink_to(image.root)
    initrd = image.initrd.read_bytes()
    program = Path(vsock_guest.__file__).read_bytes()
    overlay = archive({"init": INIT.encode(), "vsock_guest.py": program})
    (folder / "initrd").write_bytes(initrd + bytes(-len(initrd) % 4) + overlay)


@contextlib.asynccontextmanager
async def guest_with_vsock(image: Image, folder: Path, *, through_proc: bool = False) -> AsyncIterator[Guest]:
    """A VM whose only program is vsock_guest.py."""
    binary = shutil.which("qemu-system-x86_64")
    assert binary, "`sandbox-kernel setup` installs QEMU"
    prepare(image, folder)
    async with contextlib.AsyncExitStack() as stack:
        host = UserspaceVsock(3)
        stack.push_async_callback(host.aclose)
        console, console_end = socket.socketpair()
        monitor, monitor_end = socket.socketpair()
        inherited = [console_end, monitor_end, host.qemu_socket()]
        config = QemuConfig(
            binary=PurePosixPath(binary),
            image=PurePosixPath(folder),
            memory=256,
            vcpus=1,
            accelerator=(settle("auto", image) or ("tcg",))[0],
            console_fd=console_end.fileno(),
            qmp_fd=monitor_end.fileno(),
            vsock=VsockDevice(host.qemu_socket().fileno()),
        )
        # Without -no-reboot a reset of the guest is one.
        argv = [word for word in command_line(config) if word != "-no-reboot"]
        process = await asyncio.create_subprocess_exec(*argv, pass_fds=[sock.fileno() for sock in inherited])
        if through_proc:
            host.reach_memory_of(process.pid)
        for sock in inherited:
            sock.close()

        async def end() -> None:
            process.kill()
            await process.wait()

        stack.push_async_callback(end)
        reader, writer = await asyncio.open_connection(sock=console)
        stack.callback(writer.close)
        qmp = QMPClient("test")
        await qmp.connect(monitor)
        stack.push_async_callback(qmp.disconnect)
        guest = Guest(host, reader, qmp)
        await guest.line(vsock_guest.READY)
        yield guest
        assert not host.failed.done()


async def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send everything, half-close, and read until the other side's end."""
    loop = asyncio.get_running_loop()

    async def send() -> None:
        await loop.sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)

    sending = asyncio.create_task(send())
    answer = b""
    async with asyncio.timeout(READY):
        while part := await loop.sock_recv(sock, 262_144):
            answer += part
        await sending
    sock.close()
    return answer


@pytest.mark.parametrize("through_proc", [False, True], ids=["mapped", "proc"])
async def test_a_linux_guest_exchanges_streams(image: Image, tmp_path: Path, through_proc: bool) -> None:
    async with guest_with_vsock(image, tmp_path, through_proc=through_proc) as guest:
        host = guest.host

        # Large both ways at once.
        data = os.urandom(4_000_000)
        assert await exchange(await host.connect(vsock_guest.ECHO, READY), data) == data
        assert (
            await exchange(await host.connect(vsock_guest.SINK, READY), data) == hashlib.sha256(data).digest()
        )

        # The guest half-closes first, and the host may still send.
        sock = await host.connect(vsock_guest.CLOSER, READY)
        loop = asyncio.get_running_loop()
        answer = b""
        while part := await asyncio.wait_for(loop.sock_recv(sock, 100), READY):
            answer += part
        assert answer == b"goodbye"
        await loop.sock_sendall(sock, bytes(100_000))
        sock.close()
        assert await guest.line("CLOSER") == "CLOSER 100000"

        # Nobody listens there.
        with pytest.raises(ConnectionRefusedError):
            await host.connect(99, READY)

        # Many at once.
        async def one(number: int) -> None:
            sock = await host.connect(vsock_guest.ECHO, READY)
            text = b"%d " % number * 5000
            assert await exchange(sock, text) == text

        await asyncio.gather(*[one(number) for number in range(40)])
        async with asyncio.timeout(READY):
            while host.stream_count():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_streams_survive_a_pause_and_end_with_the_guests_reset(image: Image, tmp_path: Path) -> None:
    async with guest_with_vsock(image, tmp_path) as guest:
        loop = asyncio.get_running_loop()
        sock = await guest.host.connect(vsock_guest.ECHO, READY)
        await guest.qmp.execute("stop")
        await loop.sock_sendall(sock, b"while it is paused")
        await guest.qmp.execute("cont")
        assert await asyncio.wait_for(loop.sock_recv(sock, 100), READY) == b"while it is paused"
        await guest.qmp.execute("system_reset")
        assert await asyncio.wait_for(loop.sock_recv(sock, 100), READY) == b""
        sock.close()
        await guest.line(vsock_guest.READY)
        assert await exchange(await guest.host.connect(vsock_guest.ECHO, READY), b"again") == b"again"
