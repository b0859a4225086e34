"""What a client and its supervisor say to each other, without I/O.

They share one stream socket pair. The client sends one JSON object a line, the supervisor answers each with
one JSON object a line, in order:

    {"op": "prepare", ...PrepareRequest} has a VM ready whose kernel is yet to be launched; left out by most
    {"op": "launch", ...LaunchRequest}   boots the VM and starts the kernel; answered when the kernel accepts
    {"op": "signal", "number": 2}        to the kernel's process group in the guest; 0 asks whether it lives
    {"op": "status"}                     what the guest's agent reports
    {"op": "usage"}                      what the VM uses (usage.py)
    {"op": "stop"}                       orderly end of the VM

An answer is `{"ok": true, ...}` or `{"ok": false, "error": class of errors.py, "message": sentence}`. When
the client's end of the socket closes, or the client's process ends, the VM ends. The last line, which nobody
asks for, is `{"ended": status, "death": …}`: a client that is not the parent has no other way to learn the
exit status, nor any client why the kernel died (death.py; null when the end was asked for).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_kernel import errors
from sandbox_kernel.errors import ConfigurationError, SandboxKernelError
from sandbox_kernel.spec import VMSpec

MAX_LINE = 4 * 1024 * 1024
"""Bytes of one line; the environment and argv of a process are bounded by the kernel to about half of it."""
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
CONNECTION_FILE = "{connection_file}"
"""Stands in `argv` for the path that the kernel's connection file has in the guest."""


@dataclass(frozen=True)
class LaunchRequest:
    """A kernel to be started in a VM of its own.

    Attributes:
        id: names the VM's folders; lower-case letters and digits, stable over restarts of one kernel.
        spec: the VM.
        argv: the kernel's command in the guest, with `CONNECTION_FILE` where its path belongs.
        env: its environment beside what the guest sets by itself.
        connection: Jupyter's connection info, `key` as text; where the relay binds.
        client: process whose end is the VM's end.
        began: `time.monotonic` at which the start began.
        notice: a sentence that the first cell's output begins with; empty for none.
        kernel: the kernelspec's name, for people.
        mount_roots: what the administrator lets be mounted (mount.py, `check`); None: anything.
        network_caps: the administrator's caps on what of the network can be changed later, by their names.
        max_expose: how many ports the administrator lets be exposed; None: any number.
    """

    id: str
    spec: VMSpec
    argv: tuple[str, ...]
    env: Mapping[str, str]
    connection: Mapping[str, Any] = field(repr=False)
    client: int = field(default_factory=os.getpid)
    began: float = field(default_factory=time.monotonic)
    notice: str = ""
    kernel: str = ""
    mount_roots: tuple[str, ...] | None = None
    network_caps: Mapping[str, Any] = field(default_factory=dict)
    max_expose: int | None = None

    def to_line(self) -> bytes:
        """This request as a line of the protocol."""
        return to_line({"op": "launch", **dataclasses.asdict(self)})

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> LaunchRequest:
        """The request in a parsed line.

        Raises:
            ConfigurationError: a field is missing or has the wrong type.
        """
        try:
            roots = message["mount_roots"]
            most_exposed = message["max_expose"]
            request = cls(
                id=str(message["id"]),
                spec=VMSpec.from_dict(message["spec"]),
                argv=tuple(map(str, message["argv"])),
                env={str(name): str(value) for name, value in message["env"].items()},
                connection=dict(message["connection"]),
                client=int(message["client"]),
                began=float(message["began"]),
                notice=str(message["notice"]),
                kernel=str(message["kernel"]),
                mount_roots=None if roots is None else tuple(map(str, roots)),
                network_caps=dict(message["network_caps"]),
                max_expose=None if most_exposed is None else int(most_exposed),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"The launch request is malformed ({error!r}); send what control.py says."
            ) from error
        _check_id(request.id)
        if not request.argv:
            raise ConfigurationError("The kernel's argv is empty; the kernelspec must name a command.")
        return request


@dataclass(frozen=True)
class PrepareRequest:
    """A VM to be had ready before its kernel is wanted.

    Attributes:
        id, spec: as in `LaunchRequest`.
        asleep: whether its guest is left as it was saved: the template is loaded and nothing more. Else the
            guest runs, is connected and has rehearsed its start.
        client: process whose end is the end of a VM that is asleep.
    """

    id: str
    spec: VMSpec
    asleep: bool = False
    client: int = field(default_factory=os.getpid)

    def to_line(self) -> bytes:
        """This request as a line of the protocol."""
        return to_line({"op": "prepare", **dataclasses.asdict(self)})

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> PrepareRequest:
        """The request in a parsed line.

        Raises:
            ConfigurationError: a field is missing or has the wrong type.
        """
        try:
            request = cls(
                str(message["id"]),
                VMSpec.from_dict(message["spec"]),
                message["asleep"] is True,
                int(message["client"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"The prepare request is malformed ({error!r}); send what control.py says."
            ) from error
        _check_id(request.id)
        return request


def addresses(connection: Mapping[str, Any]) -> dict[str, str]:
    """ZMQ addresses of the five channels in Jupyter's connection info.

    Raises:
        ConfigurationError: a port or the address is missing, or an ipc path is too long for a socket.
    """
    try:
        transport, ip = connection["transport"], connection["ip"]
        ports = {channel: int(connection[f"{channel}_port"]) for channel in CHANNELS}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The connection info lacks {error}; it must name an address and five ports."
        ) from error
    if transport == "tcp":
        return {channel: f"tcp://{ip}:{port}" for channel, port in ports.items()}
    if transport != "ipc":
        raise ConfigurationError(f"The transport {transport!r} is not known; allowed are ipc and tcp.")
    for port in ports.values():
        path = f"{ip}-{port}"
        if len(path.encode()) > 107:
            raise ConfigurationError(
                f"The socket path {path} is longer than the 107 bytes that unix(7) allows; "
                "point XDG_RUNTIME_DIR at a shorter directory."
            )
    return {channel: f"ipc://{ip}-{port}" for channel, port in ports.items()}


def _check_id(vm: str) -> None:
    if not re.fullmatch(r"[a-z0-9]{1,32}", vm):
        raise ConfigurationError(f"The VM's id {vm[:40]!r} must be 1 to 32 lower-case letters or digits.")


def to_line(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """The message in a line.

    Raises:
        ConfigurationError: it is not a JSON object.
    """
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ConfigurationError("A line on the control socket is not JSON.") from error
    if not isinstance(message, dict):
        raise ConfigurationError("A line on the control socket is not a JSON object.")
    return message


def failure(error: SandboxKernelError) -> dict[str, Any]:
    """The answer that carries `error`."""
    return {"ok": False, "error": type(error).__name__, "message": str(error)}


def raise_failure(answer: Mapping[str, Any]) -> None:
    """Raises the error that an answer carries; returns when it carries none."""
    if answer.get("ok"):
        return
    kind = getattr(errors, str(answer.get("error")), SandboxKernelError)
    raise kind(str(answer.get("message", "The supervisor gave no reason.")))
