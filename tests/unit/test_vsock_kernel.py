"""The kernel's vsock, with AF_UNIX in the place of AF_VSOCK.

There is no vhost-vsock and no vsock loopback here: what runs is all of `KernelVsock` but the address family.
That AF_VSOCK behaves like it is tested where a guest with vhost-vsock can run. No test may connect over the
real AF_VSOCK: inside a VM without vhost-vsock that would go to the hypervisor which this machine runs on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sandbox_kernel.vsock import kernel, reservation
from sandbox_kernel.vsock.kernel import KernelVsock


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[KernelVsock, socket.socket]]:
    """The host's side, and a listener that stands for the guest's port 5."""
    host = KernelVsock(3, family=socket.AF_UNIX, address=lambda port: str(folder / str(port)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "5"))
        listener.listen()
        listener.setblocking(False)
        try:
            yield host, listener
        finally:
            await host.aclose()


async def accept(listener: socket.socket) -> socket.socket:
    sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 10)
    return sock


async def read(sock: socket.socket, count: int = 65536) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, count), 10)


async def test_connect_gives_a_stream_to_the_port(tmp_path: Path) -> None:
    async with running(tmp_path) as (host, listener):
        sock = await host.connect(5, 10)
        guest = await accept(listener)
        guest.send(b"hello")
        assert await read(sock) == b"hello"
        assert not sock.getblocking()
        sock.close()
        guest.close()


async def test_a_port_where_nobody_listens_refuses(tmp_path: Path) -> None:
    async with running(tmp_path) as (host, _):
        listening_no_more = socket.socket(socket.AF_UNIX)
        listening_no_more.bind(str(tmp_path / "6"))
        with pytest.raises(ConnectionRefusedError):
            await host.connect(6, 10)
        listening_no_more.close()


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.ENODEV, errno.EHOSTUNREACH, errno.ENETUNREACH])
async def test_every_way_to_say_no_is_a_refusal(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The answers of AF_VSOCK, which AF_UNIX does not give.
    host = KernelVsock(3, family=socket.AF_UNIX, address=str)

    async def refuse(sock: socket.socket, address: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
    with pytest.raises(ConnectionRefusedError):
        await host.connect(1, 10)
    await host.aclose()


@pytest.fixture
def af_vsock() -> Iterator[socket.socket]:
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        pytest.skip(f"this kernel has no AF_VSOCK: {error}")
    with sock:
        yield sock


def test_the_kernels_own_deadline_is_later_than_ours(af_vsock: socket.socket) -> None:
    kernel.set_connect_timeout(af_vsock, 7.5)
    alias = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(af_vsock.fileno()))
    with alias:
        seconds, _ = struct.unpack("@ll", alias.getsockopt(socket.AF_VSOCK, 6, 16))
    assert seconds == 9


async def test_after_closing_nothing_connects(tmp_path: Path) -> None:
    async with running(tmp_path) as (host, _):
        await host.aclose()
        await host.aclose()
        with pytest.raises(ConnectionRefusedError, match="the VM ended"):
            await host.connect(5, 1)
        assert not host.failed.done()


def test_the_reason_why_it_is_unavailable_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "DEVICE", tmp_path / "vhost-vsock")
    reason = reservation.unavailable()
    assert reason is not None
    assert "modprobe vhost_vsock" in reason
