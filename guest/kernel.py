"""Runs ipykernel with its five channels on AF_VSOCK sockets that the agent opened beforehand.

    python3 kernel.py MODULE [ARGUMENT…]        as `python3 -m MODULE [ARGUMENT…]` would run

libzmq can adopt a listening socket (ZMQ_USE_FD, zmq_setsockopt(3)): told to bind an ipc address, it then
accepts on that socket instead of making one, and does not mind that its family is AF_VSOCK. So nothing
stands between ipykernel's ZMQ and the virtqueue. What ipykernel calls to bind a channel is replaced here for
the one application that this process will run; what user code sees (`sys.argv`, `sys.path`, the environment,
`zmq`) is as if it had been started by `python3 -m`.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from typing import Any

import zmq

from agent_protocol import CHANNEL_FDS_VARIABLE


def adopt(zmq_socket: Any, listener: socket.socket, address: str) -> None:
    """Binds `zmq_socket` to what `listener` accepts."""
    zmq_socket.setsockopt(zmq.USE_FD, listener.fileno())
    zmq_socket.bind(address)
    zmq_socket.setsockopt(zmq.USE_FD, -1)


def patch(listeners: dict[str, socket.socket]) -> None:
    """Makes ipykernel bind its channels to `listeners`."""
    from ipykernel.heartbeat import Heartbeat
    from ipykernel.kernelapp import IPKernelApp

    def bind_channel(app: IPKernelApp, zmq_socket: Any, port: int) -> int:
        # The application binds its channels one by one and tells them apart by port.
        ports = {app.shell_port: "shell", app.stdin_port: "stdin", app.control_port: "control"}
        channel = ports.get(port, "iopub")
        adopt(zmq_socket, listeners[channel], f"ipc://{app.ip}-vsock-{port}")
        if channel == "shell":
            # The debugger talks to the shell channel from inside, by the address that was bound last.
            zmq_socket.bind(f"ipc://{app.ip}-{port}")
        return port

    def bind_heartbeat(heartbeat: Heartbeat) -> None:
        adopt(heartbeat.socket, listeners["hb"], f"ipc://{heartbeat.ip}-vsock-{heartbeat.port}")

    for owner, replacement in ((IPKernelApp, bind_channel), (Heartbeat, bind_heartbeat)):
        setattr(owner, "_try_bind_socket", replacement)  # noqa: B010 (mypy refuses the assignment)


def main() -> None:
    """Adopts the listeners and becomes the kernel."""
    fds = json.loads(os.environ.pop(CHANNEL_FDS_VARIABLE))
    listeners = {channel: socket.socket(fileno=fd) for channel, fd in fds.items()}
    for listener in listeners.values():
        listener.set_inheritable(False)
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.getcwd() if path == own else path for path in sys.path]
    patch(listeners)
    # Kept for the life of the process: libzmq uses the descriptors, these objects own them.
    main.listeners = listeners  # type: ignore[attr-defined]
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
