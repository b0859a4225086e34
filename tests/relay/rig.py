"""An ipykernel as the guest, the relay in a thread with its own event loop, clients in front of it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jupyter_client import BlockingKernelClient

from sandbox_kernel.relay.limits import RelayLimits
from sandbox_kernel.relay.relay import CHANNELS, ClientEndpoints, Relay

T = TypeVar("T")

KEY = "6a9b1f3c-a0f2b1"
LOSSLESS = """
import zmq
from ipykernel import kernelapp
class Context(zmq.Context):
    def socket(self, kind, **options):
        made = super().socket(kind, **options)
        if kind == zmq.XPUB:
            made.setsockopt(zmq.XPUB_NODROP, 1)
        return made
kernelapp.zmq.Context = Context
kernelapp.launch_new_instance()
"""
"""ipykernel as guest/kernel.py has it: its iopub waits for its subscriber.

A stock one drops what comes behind 1000 messages, which a busy machine brings about.
"""

READY = 30.0
"""Seconds for what takes no time on an idle machine; a deadline, not a measurement."""


class LoopThread:
    """An event loop that tests which block can call into."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = READY) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(timeout):
                return await coroutine

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self.run(call())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Rig:
    """Folder, kernel, relay and clients of one test."""

    def __init__(
        self,
        folder: Path,
        limits: RelayLimits | None = None,
        transport: str = "ipc",
        curve: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.folder = folder
        self.thread = LoopThread()
        self.limits = limits or RelayLimits()
        self.kernel: subprocess.Popen[bytes] | None = None
        self._clients: list[BlockingKernelClient] = []
        self.info: dict[str, Any] = {"key": KEY, "signature_scheme": "hmac-sha256", "kernel_name": ""}
        self.info |= _free_ports() if transport == "tcp" else _paths(folder / "client")
        self.addresses = addresses(self.info)
        if curve:
            self.info |= {"curve_publickey": curve[0].decode(), "curve_secretkey": curve[1].decode()}
        endpoints = ClientEndpoints(self.addresses, *(curve or (None, None)))
        self.relay = self.thread.call(lambda: Relay(self.limits))
        self.thread.call(lambda: self.relay.bind(endpoints, KEY.encode(), "hmac-sha256"))

    @property
    def guest_info(self) -> dict[str, Any]:
        return {"key": KEY, "signature_scheme": "hmac-sha256", **_paths(self.folder / "guest")}

    @property
    def guest_addresses(self) -> dict[str, str]:
        return addresses(self.guest_info)

    def start_kernel(self) -> None:
        file = self.folder / "guest.json"
        file.write_text(json.dumps(self.guest_info))
        self.kernel = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LOSSLESS,
                "-f",
                str(file),
            ],
            stdin=subprocess.DEVNULL,
        )

    async def dial(self, channel: str) -> socket.socket:
        """Connects to the channel of the kernel on this host."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(self.guest_addresses[channel].removeprefix("ipc://"))
        except BaseException:
            connection.close()
            raise
        return connection

    def attach(self) -> None:
        self.thread.run(self.relay.attach(self.dial))
        self.thread.call(self.relay.start)

    def start(self) -> None:
        self.start_kernel()
        self.attach()

    def kill_kernel(self) -> None:
        assert self.kernel is not None
        self.kernel.kill()
        self.kernel.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Looks at the relay, in its own thread, until it is as it should be."""

        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 (what is looked at has no event)
                await asyncio.sleep(0.001)

        self.thread.run(wait())

    def client(self, ready: bool = True, **changes: Any) -> BlockingKernelClient:
        client = BlockingKernelClient()
        client.load_connection_info(self.info | changes)
        client.start_channels()
        self._clients.append(client)
        if ready:
            client.wait_for_ready(timeout=READY)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.stop_channels()
        self.thread.run(self.relay.aclose())
        self.thread.close()
        if self.kernel is not None and self.kernel.poll() is None:
            self.kill_kernel()


@contextmanager
def rig(folder: Path, **options: Any) -> Iterator[Rig]:
    made = Rig(folder, **options)
    try:
        yield made
    finally:
        made.close()


def addresses(info: dict[str, Any]) -> dict[str, str]:
    separator = ":" if info["transport"] == "tcp" else "-"
    return {
        channel: f"{info['transport']}://{info['ip']}{separator}{info[channel + '_port']}"
        for channel in CHANNELS
    }


def _paths(prefix: Path) -> dict[str, Any]:
    ports = {f"{channel}_port": number for number, channel in enumerate(CHANNELS, 1)}
    return {"transport": "ipc", "ip": str(prefix), **ports}


def _free_ports() -> dict[str, Any]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in CHANNELS]
    ports = {f"{name}_port": sock.getsockname()[1] for name, sock in zip(CHANNELS, sockets, strict=True)}
    for sock in sockets:
        sock.close()
    return {"transport": "tcp", "ip": "127.0.0.1", **ports}
