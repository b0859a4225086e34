"""What a hostile guest, or a QEMU it has taken over, may try on the userspace device, and what it gets."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest
from vsock_fake_guest import CID, GUEST_BASE, FakeGuest
from vsock_rig import connected, fails, open_files, read, running, write

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.muxer import Limits
from sandbox_kernel.vsock.packet import Header
from sandbox_kernel.vsock.userspace import UserspaceVsock


async def test_a_violation_closes_streams_and_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        guest.put(b"short")
        guest.kick(guest.tx)
        await fails(host, "no room for a header")
        assert await read(sock) == b""
        assert len(caplog.records) == 1
        sock.close()


async def test_a_descriptor_outside_memory_ends_the_vm() -> None:
    async with running() as (host, guest):
        guest.describe(guest.tx, 0, 0, 44, 0)
        guest.make_available(guest.tx, 0)
        guest.kick(guest.tx)
        await fails(host, "not within one region")


async def test_a_receive_buffer_outside_memory_ends_the_vm() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        for index in range(guest.rx.size):
            guest.describe(guest.rx, index, GUEST_BASE + guest.size - 100, 4140, 2)
        await write(sock, bytes(1000))
        await fails(host, "not within one region")
        sock.close()


async def test_a_length_that_lies_ends_the_vm() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        guest.put(packet.pack(guest.header(stream, packet.RW, 1000)), b"few")
        guest.kick(guest.tx)
        await fails(host, "says 1000 bytes, its packet has 3")
        sock.close()


async def test_a_transmit_buffer_that_is_writable_ends_the_vm() -> None:
    async with running() as (host, guest):
        guest.describe(guest.tx, 0, GUEST_BASE, 44, 2)
        guest.make_available(guest.tx, 0)
        guest.kick(guest.tx)
        await fails(host, "transmit queue")


async def test_a_receive_buffer_without_room_ends_the_vm() -> None:
    async with running(buffer=44) as (host, _):
        with pytest.raises(ConnectionRefusedError):
            await host.connect(1, 10)
        await fails(host, "no room for a packet")


@pytest.mark.parametrize(
    ("number", "payload", "reason"),
    [
        (99, b"", "not negotiated"),
        (2, struct.pack("<Q", 1 << 28), "without an offer"),
        (5, struct.pack("<II", 9, 0), "9 regions"),
        (5, struct.pack("<IIQQQQ", 1, 0, 0, 4096, 0, 0), "0 files"),
        (8, struct.pack("<II", 0, 100), "runs"),
        (9, struct.pack("<IIQQQQ", 7, 0, 0, 0, 0, 0), "virtqueue 7"),
        (12, struct.pack("<Q", 0), "without a file"),
        (13, b"abc", "3 bytes"),
        (18, b"", "0 bytes"),
        (25, b"", "read-only"),
    ],
)
async def test_a_bad_message_ends_the_vm(number: int, payload: bytes, reason: str) -> None:
    async with running() as (host, guest):
        guest.request(number, payload)
        await fails(host, reason)


async def test_a_message_with_too_many_files_ends_the_vm_and_leaks_none() -> None:
    async with running() as (host, guest):
        guest.request(3, b"", [guest.file] * 9)
        await fails(host, "more than 8 files")


async def test_files_that_a_message_does_not_need_are_closed() -> None:
    async with running() as (_, guest):
        before = open_files()
        for _ in range(20):
            guest.request(3, b"", [guest.file] * 8)
        await asyncio.to_thread(guest.ask, 1)
        assert open_files() == before


async def test_a_doorbell_that_is_no_eventfd_ends_the_vm() -> None:
    async with running() as (host, guest):
        guest.request(13, struct.pack("<Q", 0), [guest.file])
        await fails(host, "not an eventfd")


@pytest.mark.parametrize("request_number", [12, 13])
async def test_a_doorbell_that_only_has_an_eventfds_name_ends_the_vm(request_number: int) -> None:
    """epoll refuses such a file, and a write to it may fail in ways that a doorbell's does not."""
    async with running() as (host, guest):
        file = os.memfd_create("anon_inode:[eventfd]", os.MFD_CLOEXEC)
        guest.request(request_number, struct.pack("<Q", 0), [file])
        os.close(file)
        await fails(host, "not an eventfd")


async def test_memory_that_could_shrink_is_refused() -> None:
    host = UserspaceVsock(CID)
    guest = FakeGuest(host.qemu_socket(), seals=0)
    guest.share_memory()
    await fails(host, "seal=on")
    guest.close()


async def test_a_message_may_arrive_in_pieces() -> None:
    async with running() as (_, guest):
        for byte in struct.pack("<III", 1, 1, 0):
            guest.sock.send(bytes([byte]))
            await asyncio.sleep(0)
        assert len(await asyncio.to_thread(guest.reply)) == 8


async def test_a_front_end_that_reads_no_answers_ends_the_vm() -> None:
    async with running() as (host, guest):
        guest.sock.setblocking(False)
        while not host.failed.done():
            try:
                guest.request(1, b"")
            except (BlockingIOError, BrokenPipeError):
                pass
            await asyncio.sleep(0)
        await fails(host, "does not read its replies")


async def test_a_guest_that_exceeds_its_credit_loses_the_stream_and_keeps_the_others() -> None:
    async with running() as (host, guest):
        greedy, stream = await connected(host, guest)
        other, other_stream = await connected(host, guest)
        for _ in range(12):
            guest.send(stream, packet.RW, bytes(60_000))
        header, _ = await guest.receive()
        while header.operation != packet.RST:
            header, _ = await guest.receive()
        assert header.src_port == stream.src_port
        guest.send(other_stream, packet.RW, b"fine")
        assert await read(other) == b"fine"
        assert not host.failed.done()
        greedy.close()
        other.close()


async def test_requests_of_the_guest_are_refused() -> None:
    async with running() as (host, guest):
        stream = Header(packet.HOST_CID, CID, 1, 2, 0, packet.STREAM, packet.REQUEST, 0, 0, 0)
        guest.send(stream, packet.REQUEST)
        header, _ = await guest.receive()
        assert (header.operation, header.src_port, header.dst_port) == (packet.RST, 1, 2)
        assert host.stream_count() == 0


async def test_a_guest_that_provokes_resets_and_takes_none_is_held_up() -> None:
    async with running(limits=Limits(max_resets=4), size=16) as (host, guest):
        stranger = Header(packet.HOST_CID, CID, 1, 2, 0, packet.STREAM, packet.REQUEST, 0, 0, 0)
        sent = 0
        async with asyncio.timeout(10):
            # 16 answers fill the guest's buffers, 4 wait in the device, and then it takes no packet more.
            while guest.tx.seen < 20:
                while guest.room:
                    guest.send(stranger, packet.REQUEST)
                    sent += 1
                await asyncio.sleep(0)
        await asyncio.to_thread(guest.ask, 1)
        assert guest.room == 0
        assert guest.tx.seen == 20
        for _ in range(sent):
            assert (await guest.receive())[0].operation == packet.RST
        assert not host.failed.done()
