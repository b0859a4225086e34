"""`python -m sandbox_kernel.supervisor CONTROL_FD CLIENT_PID`: the process around one `Supervisor`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

from sandbox_kernel.errors import ConfigurationError, GuestError, SandboxKernelError
from sandbox_kernel.supervisor.control import MAX_LINE, LaunchRequest, failure, from_line, to_line
from sandbox_kernel.supervisor.supervisor import Ending, Supervisor

log = logging.getLogger(__name__)

_NOFILE = 1024
_CLOSE = 10.0


def main() -> int:
    """Runs the supervisor until its VM has ended; the exit status is the kernel's."""
    control_fd, client_pid = int(sys.argv[1]), int(sys.argv[2])
    _confine()
    return asyncio.run(_serve(socket.socket(fileno=control_fd), client_pid))


def _confine() -> None:
    """What this process may take itself; QEMU inherits it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = _NOFILE if hard == resource.RLIM_INFINITY else min(_NOFILE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


async def _serve(control: socket.socket, client_pid: int) -> int:
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(control.fileno())
    loop.add_signal_handler(signal.SIGTERM, lambda: supervisor.end(Ending(0), orderly=True))
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    _watch_client(loop, client_pid, supervisor)
    control.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=control, limit=MAX_LINE)
    requests = loop.create_task(_answer(reader, writer, supervisor))
    either: set[asyncio.Future[Any]] = {supervisor.ended, requests}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    ending = supervisor.ended.result() if supervisor.ended.done() else Ending(1)
    if ending.reason:
        log.warning("the VM ends: %s", ending.reason)
    requests.cancel()
    await asyncio.gather(requests, return_exceptions=True)
    try:
        async with asyncio.timeout(_CLOSE):
            await supervisor.close()
    except TimeoutError:
        log.error("the clean-up took more than %s s and is left to the guardian", _CLOSE)
        os._exit(ending.status or 1)
    return ending.status


def _watch_client(loop: asyncio.AbstractEventLoop, client_pid: int, supervisor: Supervisor) -> None:
    """The end of the client's process ends the VM, even where a child of its keeps the socket open."""

    def gone() -> None:
        loop.remove_reader(pidfd)
        supervisor.end(Ending(0), orderly=True)

    try:
        pidfd = os.pidfd_open(client_pid)
    except ProcessLookupError:
        supervisor.end(Ending(0), orderly=True)
        return
    loop.add_reader(pidfd, gone)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, supervisor: Supervisor) -> None:
    """Answers the client's requests in order until it closes its end."""
    launched = False
    try:
        while line := await reader.readline():
            answer: dict[str, Any] = {"ok": True}
            try:
                message = from_line(line)
                if message.get("op") == "launch" and not launched:
                    answer |= await _while_connected(reader, supervisor, LaunchRequest.from_message(message))
                    launched = True
                    # What start-up made lives as long as the process: no need to look at it ever again.
                    gc.collect()
                    gc.freeze()
                elif message.get("op") == "signal" and launched:
                    answer["alive"] = await supervisor.signal(int(message.get("number", 0)))
                elif message.get("op") == "status" and launched:
                    answer |= await supervisor.status()
                elif message.get("op") == "stop":
                    supervisor.end(Ending(0), orderly=True)
                else:
                    raise ConfigurationError(f"The request {message.get('op')!r} does not fit here.")
            except SandboxKernelError as error:
                answer = failure(error)
            except TimeoutError:
                answer = failure(GuestError("The guest's agent did not answer in time."))
            writer.write(to_line(answer))
            await writer.drain()
            if not answer["ok"] and not launched:
                supervisor.end(Ending(1), orderly=True)
    except (ConnectionError, ValueError):  # gone, or a line beyond MAX_LINE
        pass
    supervisor.end(Ending(0), orderly=True)


async def _while_connected(
    reader: asyncio.StreamReader, supervisor: Supervisor, request: LaunchRequest
) -> dict[str, Any]:
    """Launches, and gives up as soon as the client is gone.

    The client sends nothing until it has its answer, so the end of the stream is all that can come.
    """
    launch = asyncio.ensure_future(supervisor.launch(request))
    hung_up = asyncio.ensure_future(reader.read(1))
    either: set[asyncio.Future[Any]] = {launch, supervisor.ended, hung_up}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not launch.done():
            raise ConnectionResetError
        return launch.result()
    finally:
        launch.cancel()
        hung_up.cancel()
        await asyncio.gather(launch, hung_up, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
