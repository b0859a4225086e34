"""A userspace vsock device with a guest made of Python, and short words for what tests do with them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vsock_fake_guest import CID, FakeGuest

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vsock.muxer import Limits
from sandbox_kernel.vsock.packet import Header
from sandbox_kernel.vsock.userspace import UserspaceVsock


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@asynccontextmanager
async def running(
    limits: Limits | None = None, **options: int
) -> AsyncIterator[tuple[UserspaceVsock, FakeGuest]]:
    """A device and a guest whose driver is up; afterwards no file is left open."""
    before = open_files()
    host = UserspaceVsock(CID, limits=limits)
    if options.get("own_mapping"):
        host.reach_memory_of(os.getpid())
    guest = FakeGuest(host.qemu_socket(), **options)
    try:
        await asyncio.to_thread(guest.start)
        yield host, guest
    finally:
        await host.aclose()
        guest.close()
        await asyncio.get_running_loop().shutdown_default_executor()
    assert open_files() <= before


async def connected(host: UserspaceVsock, guest: FakeGuest, port: int = 5) -> tuple[socket.socket, Header]:
    """A stream that the guest accepted: the host's socket and how the guest knows it."""
    connecting = asyncio.create_task(host.connect(port, 10))
    stream = await guest.accept()
    return await connecting, stream


async def read(sock: socket.socket, count: int = 65536) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, count), 10)


async def read_all(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await read(sock, count - len(data))
        assert part, "the stream ended early"
        data += part
    return data


async def write(sock: socket.socket, data: bytes) -> None:
    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, data), 10)


async def ended(host: UserspaceVsock) -> None:
    """Wait until no stream is left."""
    async with asyncio.timeout(10):
        while host.stream_count():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def fails(host: UserspaceVsock, reason: str) -> None:
    """The device must end the VM for this reason, and everything with it."""
    error = await asyncio.wait_for(asyncio.shield(host.failed), 10)
    assert isinstance(error, GuestProtocolError)
    assert reason in str(error)
    assert host.stream_count() == 0
    with pytest.raises(ConnectionRefusedError):
        await host.connect(1, 1)
