"""The userspace vsock device by itself, against a guest made of Python in another process.

The guest costs more than a real one's driver and as much as the device, so that the figures are a floor. Each
figure stands beside the same traffic over a plain AF_UNIX socketpair between the same two processes, run in
turn with it. `python -m bench.vsock_device [--json FILE] [--profile]`.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import pstats
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "unit"))

from vsock_fake_guest import CID, FakeGuest

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.packet import Header
from sandbox_kernel.vsock.userspace import UserspaceVsock

PACKET = 65_536
MESSAGE = 1_000
_ECHO, _SOURCE, _SINK = 1, 2, 3


def guest_main(sock: socket.socket, size: int) -> None:
    """A guest that accepts every stream and does what the port says."""
    guest = FakeGuest(sock, size=128)
    guest.start()
    payload = bytes(PACKET)
    queued = acknowledged = taken = told = 0
    stream: Header | None = None
    source_left = 0
    while True:
        try:
            packets = guest.take()
            for header, data in packets:
                if header.operation == packet.REQUEST:
                    guest.send(header, packet.RESPONSE)
                    stream = header
                    queued = acknowledged = taken = told = 0
                    source_left = size if header.dst_port == _SOURCE else 0
                    continue
                if stream is None or header.src_port != stream.src_port:
                    continue
                acknowledged = header.fwd_cnt
                taken += header.length
                if header.operation == packet.SHUTDOWN:
                    source_left = 0
                elif header.operation == packet.RW and header.dst_port == _ECHO:
                    guest.send(header, packet.RW, data, taken=taken)
                elif header.operation == packet.RW and taken - told >= 65_536:
                    told = taken
                    guest.send(header, packet.CREDIT_UPDATE, taken=taken)
            while stream and source_left and guest.room and queued - acknowledged <= 262_144 - PACKET:
                guest.send(stream, packet.RW, payload, taken=taken)
                queued += PACKET
                source_left -= PACKET
            if not packets:
                guest.wait(guest.rx, guest.tx)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def plain_main(sock: socket.socket, port: int, size: int) -> None:
    """The same without vsock."""
    buffer = bytearray(PACKET)
    if port == _SOURCE:
        payload = bytes(PACKET)
        for _ in range(size // PACKET):
            sock.sendall(payload)
        sock.recv(1)
    while count := sock.recv_into(buffer):
        if port == _ECHO:
            sock.sendall(memoryview(buffer)[:count])


async def round_trips(sock: socket.socket, count: int) -> list[float]:
    loop = asyncio.get_running_loop()
    message = bytes(MESSAGE)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await loop.sock_sendall(sock, message)
        left = MESSAGE
        while left:
            left -= len(await loop.sock_recv(sock, left))
        times.append(time.perf_counter() - start)
    return times


async def receive(sock: socket.socket, size: int) -> float:
    loop = asyncio.get_running_loop()
    buffer = bytearray(1 << 20)
    start = time.perf_counter()
    left = size
    while left:
        left -= await loop.sock_recv_into(sock, buffer)
    return size / (time.perf_counter() - start)


async def send(sock: socket.socket, size: int) -> float:
    loop = asyncio.get_running_loop()
    payload = bytes(PACKET)
    start = time.perf_counter()
    for _ in range(size // PACKET):
        await loop.sock_sendall(sock, payload)
    return size / (time.perf_counter() - start)


async def one_run(open_stream: Any, size: int, trips: int) -> dict[str, float]:
    sock = await open_stream(_ECHO)
    await round_trips(sock, 50)
    times = sorted(await round_trips(sock, trips))
    sock.close()
    sock = await open_stream(_SOURCE)
    to_host = await receive(sock, size)
    sock.close()
    sock = await open_stream(_SINK)
    to_guest = await send(sock, size)
    sock.close()
    return {
        "round_trip_p50_us": statistics.median(times) * 1e6,
        "round_trip_p99_us": times[int(len(times) * 0.99)] * 1e6,
        "guest_to_host_MBps": to_host / 1e6,
        "host_to_guest_MBps": to_guest / 1e6,
    }


async def measure(size: int, trips: int, rounds: int, profile: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    host = UserspaceVsock(CID)
    end = host.qemu_socket()
    child = context.Process(target=guest_main, args=(end, size), daemon=True)
    child.start()
    end.close()

    async def through_vsock(port: int) -> socket.socket:
        while True:
            try:
                return await host.connect(port, 10)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)

    plain_children = []

    async def through_socketpair(port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        process = context.Process(target=plain_main, args=(theirs, port, size), daemon=True)
        process.start()
        plain_children.append(process)
        theirs.close()
        ours.setblocking(False)
        return ours

    (await through_vsock(_ECHO)).close()
    profiler = cProfile.Profile()
    results: dict[str, list[dict[str, float]]] = {"vsock": [], "socketpair": []}
    for _ in range(rounds):
        if profile:
            profiler.enable()
        results["vsock"].append(await one_run(through_vsock, size, trips))
        profiler.disable()
        results["socketpair"].append(await one_run(through_socketpair, size, trips))
    await host.aclose()
    child.join(5)
    for process in plain_children:
        process.terminate()
        process.join()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    ratio = {key: medians["vsock"][key] / medians["socketpair"][key] for key in medians["vsock"]}
    return {"bytes": size, "rounds": rounds, "cpus": os.cpu_count(), **medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--size", type=int, default=20 << 20, help="bytes each way")
    parser.add_argument("--trips", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--profile", action="store_true", help="print where the device's process spends its time"
    )
    options = parser.parse_args()
    result = asyncio.run(measure(options.size, options.trips, options.rounds, options.profile))
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
