"""Runs ipykernel with its five channels on AF_VSOCK sockets that the agent opened beforehand.

    python3 kernel.py MODULE [ARGUMENT…]        as `python3 -m MODULE [ARGUMENT…]` would run

libzmq can adopt a listening socket (ZMQ_USE_FD, zmq_setsockopt(3)): told to bind an ipc address, it then
accepts on that socket instead of making one, and does not mind that its family is AF_VSOCK. So nothing stands
between ipykernel's ZMQ and the virtqueue. What ipykernel calls to bind a channel is replaced here for the one
application that this process will run; what user code sees (`sys.argv`, `sys.path`, `sys.modules`, the
environment, `zmq`) is as if it had been started by `python3 -m`.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys

_OWN = os.path.dirname(os.path.abspath(__file__))
_listeners: dict[str, socket.socket] = {}
"""Kept for the life of the process: libzmq uses the descriptors, these objects own them."""


def take_listeners() -> None:
    """Takes over the listening sockets that the agent has passed down."""
    sys.path.insert(0, _OWN)
    from agent_protocol import CHANNEL_FDS_VARIABLE

    sys.path.remove(_OWN)
    del sys.modules["agent_protocol"]
    for channel, fd in json.loads(os.environ.pop(CHANNEL_FDS_VARIABLE)).items():
        _listeners[channel] = socket.socket(fileno=fd)
        _listeners[channel].set_inheritable(False)


def restore_path() -> None:
    """Puts the current folder where Python has put this program's, as `-m` does.

    With `-P` or `-I` neither is there (python(1)).
    """
    sys.path[:] = [os.getcwd() if path == _OWN else path for path in sys.path]


def patch() -> None:
    """Makes ipykernel bind its channels to the listeners."""
    import zmq
    from ipykernel.heartbeat import Heartbeat
    from ipykernel.kernelapp import IPKernelApp

    def adopt(zmq_socket: zmq.Socket[bytes], channel: str, address: str) -> None:
        zmq_socket.setsockopt(zmq.USE_FD, _listeners[channel].fileno())
        zmq_socket.bind(address)
        zmq_socket.setsockopt(zmq.USE_FD, -1)

    def bind_channel(app: IPKernelApp, zmq_socket: zmq.Socket[bytes], port: int) -> int:
        # The application binds its channels one by one and tells them apart by port.
        ports = {app.shell_port: "shell", app.stdin_port: "stdin", app.control_port: "control"}
        channel = ports.get(port, "iopub")
        adopt(zmq_socket, channel, f"ipc://{app.ip}-vsock-{port}")
        if channel == "shell":
            # The debugger talks to the shell channel from inside, by the address that was bound last.
            zmq_socket.bind(f"ipc://{app.ip}-{port}")
        return port

    def bind_heartbeat(heartbeat: Heartbeat) -> None:
        adopt(heartbeat.socket, "hb", f"ipc://{heartbeat.ip}-vsock-{heartbeat.port}")

    IPKernelApp._try_bind_socket = bind_channel  # type: ignore[method-assign]
    Heartbeat._try_bind_socket = bind_heartbeat  # type: ignore[method-assign]


def main() -> None:
    """Adopts the listeners and becomes the kernel."""
    take_listeners()
    restore_path()
    patch()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
