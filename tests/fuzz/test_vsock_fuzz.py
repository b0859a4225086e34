"""Fuzz target: the device with arbitrary guest memory; only `GuestProtocolError` may come out.

A run is a list of steps on a device with two rings in 64 KiB of guest memory: store bytes anywhere, describe
a buffer with a tempting address, forge a header, raise an index, kick, and on the host's side open, write,
read and close local sockets. Violations of one stream must stay inside; after a `GuestProtocolError` the VM
is over and so is the run. Whatever came before, what the host buffers stays within its bounds.

`python -m pytest tests/fuzz` is quick; `python -m pytest tests/fuzz -m fuzz` runs long.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import socket
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.protocol import RingAddresses
from sandbox_kernel.vhost_user.ring import Ring
from sandbox_kernel.virtio.memory import MappedMemory, Region
from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.device import MAX_CHAIN, Device
from sandbox_kernel.vsock.muxer import Limits, Muxer

MEMORY = 65_536
SIZE = 8
CID = 3
LIMITS = Limits(max_streams=4, max_closing=2, max_resets=4, window=4096)
RINGS = [RingAddresses(0, 0x000, 0x200, 0x100), RingAddresses(1, 0x400, 0x600, 0x500)]
BUFFERS = 0x1000


class Victim:
    """The device, its memory, and the local peers of its streams."""

    def __init__(self) -> None:
        file = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(file, MEMORY)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory = MappedMemory([Region(0, MEMORY, 0, 0)], [file])
        os.close(file)
        self.muxer = Muxer(CID, LIMITS)
        self.device = Device(self.muxer)
        self.peers: list[socket.socket] = []
        self.rings = []
        for addresses in RINGS:
            ring = Ring(addresses.index, MAX_CHAIN)
            ring.set_size(SIZE)
            ring.set_base(0)
            ring.set_addresses(addresses)
            ring.set_kick(os.eventfd(0, os.EFD_CLOEXEC))
            ring.enable(True)
            assert ring.run(self.memory)
            self.device.ring_started(ring)
            ring.fresh = False
            self.rings.append(ring)

    def step(self, kind: str, *values: Any) -> None:
        getattr(self, kind)(*values)

    def store(self, address: int, data: bytes) -> None:
        self.memory.write(address % (MEMORY - len(data)), data)

    def describe(self, ring: int, index: int, address: int, length: int, flags: int, following: int) -> None:
        row = struct.pack("<QIHH", address, length, flags, following)
        self.memory.write(RINGS[ring].descriptors + 16 * index, row)

    def offer(self, ring: int, head: int, ahead: int) -> None:
        at = RINGS[ring].available
        index = self.memory.load16(at + 2)
        self.memory.write(at + 4 + 2 * (index % SIZE), struct.pack("<H", head))
        self.memory.write(at + 2, struct.pack("<H", (index + ahead) & 0xFFFF))

    def send(self, slot: int, stream: int, operation: int, length: int, flags: int, taken: int) -> None:
        """A packet that fits its chain, so that the fuzzer gets behind the first checks."""
        address = BUFFERS + 0x1000 * slot
        header = (CID, 2, stream, 1024 + stream, length, 1, operation, flags, 4096, taken)
        self.memory.write(address, packet.LAYOUT.pack(*header))
        self.describe(1, slot, address, packet.SIZE + length, 0, 0)
        self.offer(1, slot, 1)

    def receive(self, slot: int) -> None:
        """An honest receive buffer."""
        self.describe(0, slot, BUFFERS + 0x8000 + 0x400 * slot, 0x400, 2, 0)
        self.offer(0, slot, 1)

    def open(self, stream: int) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self.device.open(stream, theirs, lambda accepted: None)
        except ConnectionRefusedError:
            ours.close()
            theirs.close()
        else:
            self.peers.append(ours)

    def local(self, which: int, action: int) -> None:
        if not self.peers:
            return
        peer = self.peers[which % len(self.peers)]
        try:
            if action == 0:
                peer.send(bytes(3000))
            elif action == 1:
                peer.recv(10_000)
            elif action == 2:
                peer.shutdown(socket.SHUT_WR)
            else:
                peer.close()
        except OSError:
            pass

    def turn(self) -> None:
        for ring in self.rings:
            os.eventfd_write(ring.kick, 1)
        for _ in range(20):
            if not self.device.turn():
                break
        assert len(self.muxer) <= LIMITS.max_streams + LIMITS.max_closing
        for stream in self.device._by_socket.values():
            assert len(stream.backlog) <= LIMITS.window

    def close(self) -> None:
        for ring in self.rings:
            self.device.ring_stopped(ring)
            ring.close()
        self.device.close()
        self.memory.close()
        for peer in self.peers:
            peer.close()


U16 = st.integers(0, 0xFFFF)
ADDRESS = st.one_of(
    st.integers(0, MEMORY), st.sampled_from([2**64 - 1, 2**63, MEMORY - 1]), st.integers(0, 2**64 - 1)
)
LENGTH = st.one_of(st.integers(0, 5000), st.sampled_from([43, 44, 45, 2**16, 2**31, 2**32 - 1]))
TAKEN = st.one_of(st.just(0), st.integers(0, 3000), st.integers(0, 2**32 - 1))
SLOT = st.integers(0, SIZE - 1)

STEPS = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("store"), st.integers(0, 0x7FF), st.binary(min_size=1, max_size=64)),
    st.tuples(
        st.just("describe"),
        st.integers(0, 1),
        SLOT,
        ADDRESS,
        LENGTH,
        st.one_of(st.integers(0, 3), U16),
        st.one_of(SLOT, U16),
    ),
    st.tuples(st.just("offer"), st.integers(0, 1), st.one_of(SLOT, U16), st.one_of(st.just(1), U16)),
    st.tuples(
        st.just("send"),
        SLOT,
        st.integers(0, 4),
        st.integers(0, 9),
        st.integers(0, 3000),
        st.integers(0, 4),
        TAKEN,
    ),
    st.tuples(
        st.just("send"), SLOT, st.integers(0, 4), st.sampled_from([2, 4, 6, 7]), st.just(0), SLOT, TAKEN
    ),
    st.tuples(st.just("receive"), SLOT),
    st.tuples(st.just("open"), st.integers(0, 4)),
    st.tuples(st.just("local"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("turn")),
)


def run(steps: list[tuple[Any, ...]]) -> None:
    """One run; any exception but the defined one is a finding."""
    log = logging.getLogger("sandbox_kernel.vsock")
    log.setLevel(logging.CRITICAL)
    victim = Victim()
    try:
        for step in steps:
            victim.step(*step)
        victim.turn()
    except GuestProtocolError:
        pass
    finally:
        victim.close()
        log.setLevel(logging.NOTSET)  # other tests look at what is logged


SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, suppress_health_check=SUPPRESSED)
@given(st.lists(STEPS, max_size=60))
def test_a_hostile_guest_gets_nothing_but_the_defined_error(steps: list[tuple[Any, ...]]) -> None:
    run(steps)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=20_000, suppress_health_check=SUPPRESSED)
@given(st.lists(STEPS, max_size=200))
def test_a_hostile_guest_gets_nothing_but_the_defined_error_for_long(steps: list[tuple[Any, ...]]) -> None:
    run(steps)


def test_random_runs_reach_open_streams_and_their_data() -> None:
    """The target is worth its time only if its steps get behind the first checks."""
    dice = random.Random(1)
    victim = Victim()
    moved = 0
    for port in range(4):
        victim.open(port)
        victim.receive(port)
    victim.turn()
    for port in range(4):
        victim.send(port, port, packet.RESPONSE, 0, 0, 0)
    victim.turn()
    for _ in range(200):
        victim.send(dice.randrange(SIZE), dice.randrange(4), packet.RW, dice.randrange(1000), 0, 0)
        at = RINGS[0]
        if victim.memory.load16(at.available + 2) - victim.memory.load16(at.used + 2) < SIZE:
            victim.receive(dice.randrange(SIZE))
        victim.turn()
        for peer in victim.peers:
            try:
                moved += len(peer.recv(65_536))
            except BlockingIOError:
                pass
    assert moved > 10_000
    victim.close()
