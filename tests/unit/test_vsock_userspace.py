"""The whole userspace device against a guest made of Python."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

import pytest
from vsock_fake_guest import CID, GUEST_BASE, RX, TX
from vsock_rig import connected, ended, read, read_all, running, write

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import WINDOW
from sandbox_kernel.vsock.muxer import Limits
from sandbox_kernel.vsock.userspace import UserspaceVsock


async def test_bytes_go_both_ways() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        await write(sock, b"ping")
        header, payload = await guest.receive()
        assert (header.operation, payload) == (packet.RW, b"ping")
        guest.send(stream, packet.RW, b"pong", taken=4)
        assert await read(sock) == b"pong"
        assert host.stream_count() == 1
        sock.close()


async def test_a_port_where_nobody_listens_refuses() -> None:
    async with running() as (host, guest):
        connecting = asyncio.create_task(host.connect(9, 10))
        header, _ = await guest.receive()
        guest.send(header, packet.RST)
        with pytest.raises(ConnectionRefusedError):
            await connecting
        assert host.stream_count() == 0


async def test_a_guest_without_driver_refuses_at_once() -> None:
    host = UserspaceVsock(CID)
    with pytest.raises(ConnectionRefusedError):
        await host.connect(1, 10)
    await host.aclose()


async def test_a_guest_that_does_not_answer_is_given_up_with_a_reset() -> None:
    async with running() as (host, guest):
        with pytest.raises(TimeoutError):
            await host.connect(1, 0.01)
        assert (await guest.receive())[0].operation == packet.REQUEST
        assert (await guest.receive())[0].operation == packet.RST
        assert host.stream_count() == 0


async def test_a_cancelled_connect_leaves_no_stream() -> None:
    async with running() as (host, guest):
        connecting = asyncio.create_task(host.connect(1, 10))
        await guest.receive()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert (await guest.receive())[0].operation == packet.RST
        assert host.stream_count() == 0


async def test_a_half_close_of_the_host_reaches_the_guest_which_may_still_send() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        await write(sock, b"question")
        sock.shutdown(socket.SHUT_WR)
        assert (await guest.receive())[1] == b"question"
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_SEND)
        guest.send(stream, packet.RW, b"answer", taken=8)
        assert await read(sock) == b"answer"
        guest.send(stream, packet.SHUTDOWN, flags=packet.SHUTDOWN_SEND, taken=8)
        assert await read(sock) == b""
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_BOTH)
        guest.send(stream, packet.RST)
        await ended(host)
        sock.close()


async def test_a_half_close_of_the_guest_reaches_the_host_which_may_still_send() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        guest.send(stream, packet.RW, b"all")
        guest.send(stream, packet.SHUTDOWN, flags=packet.SHUTDOWN_SEND)
        assert await read(sock) == b"all"
        assert await read(sock) == b""
        await write(sock, b"reply")
        assert (await guest.receive())[1] == b"reply"
        sock.close()
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_BOTH)
        await ended(host)


async def test_a_close_of_the_guest_is_confirmed_and_its_last_bytes_arrive() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        for _ in range(4):
            guest.send(stream, packet.RW, bytes(60_000))
        guest.send(stream, packet.SHUTDOWN, flags=packet.SHUTDOWN_BOTH)
        header, _ = await guest.receive()
        while header.operation == packet.CREDIT_UPDATE:
            header, _ = await guest.receive()
        assert header.operation == packet.RST
        assert await read_all(sock, 240_000) == bytes(240_000)
        assert await read(sock) == b""
        await ended(host)
        sock.close()


async def test_a_host_that_goes_away_ends_the_guests_stream() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        sock.close()
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_BOTH)
        guest.send(stream, packet.RW, b"on its way")
        guest.send(stream, packet.RST)
        # The stream is forgotten: one more packet of it is answered.
        guest.send(stream, packet.RW, b"late")
        assert (await guest.receive())[0].operation == packet.RST


async def test_a_local_peer_that_only_stops_reading_ends_the_guests_sending() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        sock.shutdown(socket.SHUT_RD)
        guest.send(stream, packet.RW, b"lost")
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_RECEIVE)
        await write(sock, b"still")
        assert (await guest.receive())[1] == b"still"
        sock.close()


async def test_a_guest_that_stops_reading_makes_the_host_finish() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        guest.send(stream, packet.SHUTDOWN, flags=packet.SHUTDOWN_RECEIVE)
        header, _ = await guest.receive()
        assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_SEND)
        with pytest.raises(BrokenPipeError):
            await write(sock, b"x")
        guest.send(stream, packet.RW, b"listen")
        assert await read(sock) == b"listen"
        sock.close()


async def test_large_payloads_are_split_to_the_buffers_that_the_guest_offers() -> None:
    async with running(buffer=144) as (host, guest):
        sock, _ = await connected(host, guest)
        data = os.urandom(5_000)
        await write(sock, data)
        got = b""
        while len(got) < len(data):
            header, payload = await guest.receive()
            assert header.length <= 100
            got += payload
        assert got == data
        sock.close()


async def test_a_receive_buffer_may_be_spread_over_descriptors() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        # Use the buffers up, then offer one in three parts whose borders cut header and payload.
        base = GUEST_BASE + guest.size - 4096
        while guest.rx.offered > guest.rx.seen:
            await write(sock, b"b")
            await guest.receive(give_back=False)
        for index, (offset, length) in enumerate([(0, 20), (100, 30), (200, 500)]):
            flags = 2 | (1 if index < 2 else 0)
            guest.describe(guest.rx, index, base + offset, length, flags, index + 1)
        guest.make_available(guest.rx, 0)
        guest.kick(guest.rx)
        await write(sock, b"0123456789")
        while not (used_now := guest.used(guest.rx)):
            await guest.interrupt(guest.rx)
        assert used_now == [(0, packet.SIZE + 10)]
        at = guest.size - 4096
        spread = (
            guest.memory[at : at + 20] + guest.memory[at + 100 : at + 130] + guest.memory[at + 200 : at + 204]
        )
        assert packet.parse(spread).length == 10
        assert spread[packet.SIZE :] == b"0123456789"
        sock.close()


async def test_the_host_sends_no_more_than_the_guest_can_buffer() -> None:
    async with running() as (host, guest):
        guest.window = 1000
        sock, stream = await connected(host, guest)
        await write(sock, bytes(5000))
        got = 0
        while got < 1000:
            got += (await guest.receive())[0].length
        assert got == 1000
        guest.send(stream, packet.CREDIT_REQUEST, taken=0)
        assert (await guest.receive())[0].operation == packet.CREDIT_UPDATE
        guest.send(stream, packet.CREDIT_UPDATE, taken=300)
        assert (await guest.receive())[0].length == 300
        sock.close()


async def test_a_slow_reader_holds_the_guest_back_and_loses_nothing() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        data = os.urandom(3 * WINDOW)
        sent = taken = 0
        got = b""
        while len(got) < len(data):
            for header, _ in guest.take():
                taken = header.fwd_cnt
            while sent < len(data) and guest.room and sent - taken < WINDOW:
                part = data[sent : sent + min(32_768, WINDOW - (sent - taken))]
                guest.send(stream, packet.RW, part)
                sent += len(part)
            got += await read(sock, 10_000)
            # In the socket's buffer is what is no longer in the device's.
            assert sent - len(got) <= WINDOW + sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert got == data
        assert not host.failed.done()
        sock.close()


async def test_many_streams_at_once_keep_their_bytes_apart() -> None:
    async with running() as (host, guest):
        pairs = [await connected(host, guest, port) for port in range(1, 101)]
        for number, (sock, _) in enumerate(pairs):
            await write(sock, b"%d" % number)
        got = {}
        while len(got) < len(pairs):
            header, payload = await guest.receive()
            got[header.src_port, header.dst_port] = payload
        for number, (sock, stream) in enumerate(pairs):
            assert got[stream.src_port, stream.dst_port] == b"%d" % number
            while not guest.room:
                await guest.interrupt(guest.tx)
            guest.send(stream, packet.RW, b"<%d>" % number)
            assert await read(sock) == b"<%d>" % number
            sock.close()


async def test_more_streams_than_allowed_are_refused() -> None:
    async with running(limits=Limits(max_streams=1)) as (host, guest):
        sock, _ = await connected(host, guest)
        with pytest.raises(ConnectionRefusedError, match="1 vsock streams"):
            await host.connect(1, 10)
        sock.close()


async def test_a_flooding_stream_does_not_hold_up_another() -> None:
    async with running(size=16) as (host, guest):
        flood, _ = await connected(host, guest)
        quiet, quiet_stream = await connected(host, guest)
        # The guest takes nothing for a while: both streams have bytes that wait for buffers.
        filled = 0
        while filled < 16:
            await write(flood, bytes(4096))
            (index,) = struct.unpack_from("<H", guest.memory, guest.rx.used + 2)
            filled = (index - guest.rx.seen) & 0xFFFF
        await write(flood, bytes(100_000))
        await write(quiet, b"urgent")
        order = []
        while True:
            header, payload = await guest.receive()
            order.append(header.src_port)
            if header.src_port == quiet_stream.src_port:
                assert payload == b"urgent"
                break
        # What was in the ring, then one quantum of the flood at most, then the quiet stream.
        assert len(order) <= 16 + 16 + 1
        flood.close()
        quiet.close()


async def test_a_paused_vm_keeps_its_streams() -> None:
    async with running() as (host, guest):
        sock, stream = await connected(host, guest)
        for index in (RX, TX):
            base = await asyncio.to_thread(guest.stop_ring, index)
            guest.start_ring(index, base)
        guest.send(stream, packet.RW, b"after")
        assert await read(sock) == b"after"
        await write(sock, b"too")
        assert (await guest.receive())[1] == b"too"
        sock.close()


async def test_a_driver_that_begins_anew_ends_the_streams_of_the_old_one() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        await asyncio.to_thread(guest.stop_ring, TX)
        await asyncio.to_thread(guest.stop_ring, RX)
        guest.memory[guest.tx.available : guest.tx.available + 4] = bytes(4)
        guest.start_ring(TX, 0)
        assert await read(sock) == b""
        sock.close()


async def test_the_end_of_qemu_ends_all_streams_and_is_no_failure() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        guest.sock.close()
        assert await read(sock) == b""
        with pytest.raises(ConnectionRefusedError):
            await host.connect(1, 1)
        assert not host.failed.done()
        sock.close()


async def test_a_qemu_that_dies_before_its_answer_is_no_failure() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        guest.request(1, b"")
        guest.sock.close()
        assert await read(sock) == b""
        assert not host.failed.done()
        sock.close()


async def test_closing_ends_streams_and_waiting_connects() -> None:
    async with running() as (host, guest):
        sock, _ = await connected(host, guest)
        waiting = asyncio.create_task(host.connect(1, 10))
        await guest.receive()
        await host.aclose()
        await host.aclose()
        with pytest.raises(ConnectionRefusedError):
            await waiting
        assert await read(sock) == b""
        assert host.stream_count() == 0
        sock.close()


async def test_memory_through_proc_carries_the_same_bytes() -> None:
    # The process whose memory is read is this one, which has the guest's memory mapped.
    async with running(own_mapping=True) as (host, guest):
        sock, stream = await connected(host, guest)
        data = os.urandom(50_000)
        await write(sock, data)
        got = b""
        while len(got) < len(data):
            got += (await guest.receive())[1]
        assert got == data
        guest.send(stream, packet.RW, data, taken=len(data))
        assert await read_all(sock, len(data)) == data
        sock.close()
