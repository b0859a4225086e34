"""A supervisor's process: its limits, its client's requests, its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from sandbox_kernel.death import Death
from sandbox_kernel.errors import ConfigurationError, GuestError, HostShuttingDown, SandboxKernelError
from sandbox_kernel.supervisor.control import (
    MAX_LINE,
    LaunchRequest,
    PrepareRequest,
    failure,
    from_line,
    to_line,
)
from sandbox_kernel.supervisor.first import First
from sandbox_kernel.supervisor.supervisor import Ending, Supervisor

log = logging.getLogger(__name__)

_CLOSE = 10.0
_STARTS = ("prepare", "launch")
_SETTLE_AFTER = 1.0
"""Seconds after a start: the first messages of its clients come first."""


async def serve(control_fd: int, request: First) -> int:
    """Serves a client until its VM has ended.

    Args:
        control_fd: this end of the client's socket.
        request: the first one, which has been read from there.

    Returns:
        The kernel's exit status, to be this process's own.
    """
    control = socket.socket(fileno=control_fd)
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(control.fileno(), request.begun)
    loop.add_signal_handler(signal.SIGTERM, lambda: supervisor.end(Ending(0, _host_wants_it())))
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    control.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=control, limit=MAX_LINE)
    requests = loop.create_task(_answer(request.line, reader, writer, supervisor))
    either: set[asyncio.Future[Any]] = {supervisor.ended, requests}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    ending = supervisor.ended.result() if supervisor.ended.done() else Ending(1)
    if ending.death is not None:
        log.warning("the VM ends: %s", ending.death.to_dict())
    requests.cancel()
    await asyncio.gather(requests, return_exceptions=True)
    try:
        async with asyncio.timeout(_CLOSE):
            await supervisor.close()
    except TimeoutError:
        log.error("the clean-up took more than %s s and is left to the guardian", _CLOSE)
        os._exit(ending.status or 1)
    with suppress(OSError):
        death = ending.death.to_dict() if ending.death is not None else None
        writer.write(to_line({"ended": ending.status, "death": death}))
    return ending.status


def _host_wants_it() -> Death:
    return Death.of(
        HostShuttingDown(
            "The VM was ended from outside (SIGTERM to its supervisor), as when the host shuts down; "
            "start the kernel anew."
        )
    )


def _watch_client(client_pid: int, supervisor: Supervisor) -> None:
    """The end of the client's process ends the VM, even where a child of its keeps the socket open."""
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(pidfd)
        supervisor.end(Ending(0), orderly=True)

    try:
        pidfd = os.pidfd_open(client_pid)
    except ProcessLookupError:
        supervisor.end(Ending(0), orderly=True)
        return
    loop.add_reader(pidfd, gone)


async def _answer(
    line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, supervisor: Supervisor
) -> None:
    """Answers the client's requests in order, from the one in `line` on, until it closes its end."""
    launched, opening = False, None
    try:
        while line:
            try:
                message = from_line(line)
                op = message.get("op")
                answer = {"ok": True, **await _perform(reader, supervisor, message, launched)}
                launched = launched or op == "launch"
                if op in _STARTS:
                    asyncio.get_running_loop().call_later(_SETTLE_AFTER, _settle)
                if op == "launch":
                    opening = asyncio.get_running_loop().create_task(supervisor.open_window())
            except SandboxKernelError as error:
                answer = failure(error)
            except TimeoutError:
                answer = failure(GuestError("The guest's agent did not answer in time."))
            writer.write(to_line(answer))
            await writer.drain()
            if not answer["ok"] and not launched:
                supervisor.end(Ending(1), orderly=True)
            line = await reader.readline()
    except (ConnectionError, ValueError):  # gone, or a line beyond MAX_LINE
        pass
    finally:
        if opening is not None:
            await opening
    supervisor.end(Ending(0), orderly=True)


async def _perform(
    reader: asyncio.StreamReader, supervisor: Supervisor, message: dict[str, Any], launched: bool
) -> dict[str, Any]:
    """Does what a request asks for; the fields of its answer."""
    match message.get("op"):
        case "prepare" if not launched:
            prepare = PrepareRequest.from_message(message)
            if prepare.asleep:
                _watch_client(prepare.client, supervisor)
            return await _while_connected(reader, supervisor, supervisor.prepare(prepare))
        case "launch" if not launched:
            launch = LaunchRequest.from_message(message)
            _watch_client(launch.client, supervisor)
            return await _while_connected(reader, supervisor, supervisor.launch(launch))
        case "signal" if launched:
            return {"alive": await supervisor.signal(int(message.get("number", 0)))}
        case "usage" if launched:
            return {"usage": (await supervisor.usage()).to_dict()}
        case "status" if launched:
            return await supervisor.status()
        case "stop":
            supervisor.end(Ending(0), orderly=True)
            return {}
        case op:
            raise ConfigurationError(f"The request {op!r} does not fit here.")


def _settle() -> None:
    """What start-up made lives as long as the process: no need to look at it ever again."""
    gc.collect()
    gc.freeze()


async def _while_connected(
    reader: asyncio.StreamReader, supervisor: Supervisor, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Does `work`, and gives up as soon as the client is gone.

    The client sends nothing until it has its answer, so the end of the stream is all that can come.
    """
    doing = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(reader.read(1))
    either: set[asyncio.Future[Any]] = {doing, supervisor.ended, hung_up}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ConnectionResetError
        return doing.result()
    finally:
        doing.cancel()
        hung_up.cancel()
        await asyncio.gather(doing, hung_up, return_exceptions=True)
