"""Runs ipykernel with its five channels on AF_VSOCK sockets that the agent opened beforehand.

    python3 kernel.py MODULE [ARGUMENT…]        as `python3 -m MODULE [ARGUMENT…]` would run

libzmq can adopt a listening socket (ZMQ_USE_FD, zmq_setsockopt(3)): told to bind an ipc address, it then
accepts on that socket instead of making one, and does not mind that its family is AF_VSOCK. So nothing stands
between ipykernel's ZMQ and the virtqueue. What ipykernel calls to bind a channel is replaced here for the one
application that this process will run; what user code sees (`sys.argv`, `sys.path`, `sys.modules`, the
environment, `zmq`) is as if it had been started by `python3 -m`.

Two more things keep the host's relay from being noticed. Its ZMQ identity, the first hop of every request, is
taken off what the kernel's ROUTER sockets receive and put back on what they send to a client behind it. And
iopub waits for the relay, its one subscriber, instead of dropping what the relay does not take at once
(backpressure.py).
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import runpy
import signal
import socket
import sys
import threading
from typing import Any

_OWN = os.path.dirname(os.path.abspath(__file__))
_listeners: dict[str, socket.socket] = {}
"""Kept for the life of the process: libzmq uses the descriptors, these objects own them."""
_relay = b""
"""The relay's identity."""
_standby: dict[str, Any] = {}
"""For a template's kernel: descriptor to the agent, and modules to import."""


def take_listeners() -> None:
    """Takes over the listening sockets that the agent has passed down, and where its stacks are to go."""
    sys.path.insert(0, _OWN)
    from agent_protocol import (
        CHANNEL_FDS_VARIABLE,
        RELAY_IDENTITY,
        STACKS_FD_VARIABLE,
        STACKS_SIGNAL,
        STANDBY_VARIABLE,
    )

    global _relay
    _relay = RELAY_IDENTITY
    stacks = int(os.environ.pop(STACKS_FD_VARIABLE))
    os.set_inheritable(stacks, False)
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    sys.path.remove(_OWN)
    del sys.modules["agent_protocol"]
    _standby.update(json.loads(os.environ.pop(STANDBY_VARIABLE, "{}")))
    for channel, fd in json.loads(os.environ.pop(CHANNEL_FDS_VARIABLE)).items():
        _listeners[channel] = socket.socket(fileno=fd)
        _listeners[channel].set_inheritable(False)


def keep_interrupts() -> None:
    """Has an interrupt wait while the process forks.

    Hooks around a fork, and its warning about threads, print what is raised in them, and Python goes on: an
    interrupt that falls there is lost, and code that does nothing but fork spends most of its time there.
    """

    def keeping(fork: Any) -> Any:
        @functools.wraps(fork)
        def wrapper() -> Any:
            handler = signal.getsignal(signal.SIGINT)
            if not callable(handler) or threading.current_thread() is not threading.main_thread():
                return fork()
            late: list[Any] = []
            signal.signal(signal.SIGINT, lambda *arguments: late.append(arguments))
            try:
                return fork()
            finally:
                signal.signal(signal.SIGINT, handler)
                if late:
                    handler(*late[0])

        return wrapper

    os.fork, os.forkpty = keeping(os.fork), keeping(os.forkpty)


def end_copies() -> None:
    """Has a forked copy of this process end with its cell: it shares the channels, and would read them."""
    from ipykernel.kernelbase import Kernel

    original: Any = Kernel.post_handler_hook
    kernel = os.getpid()

    def post_handler_hook(self: Kernel) -> None:
        if os.getpid() != kernel:
            os._exit(0)
        original(self)

    Kernel.post_handler_hook = post_handler_hook  # type: ignore[method-assign]


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

    sys.path.insert(0, _OWN)
    import backpressure

    sys.path.remove(_OWN)
    del sys.modules["backpressure"]
    backpressure.install()

    def adopt(zmq_socket: zmq.Socket[bytes], channel: str, address: str) -> None:
        zmq_socket.setsockopt(zmq.USE_FD, _listeners[channel].fileno())
        zmq_socket.bind(address)
        zmq_socket.setsockopt(zmq.USE_FD, -1)

    class Router(zmq.Socket[bytes]):
        """A ROUTER that does not show the relay's hop."""

        def recv_multipart(self, *args: Any, **options: Any) -> Any:
            frames = super().recv_multipart(*args, **options)
            if bytes(frames[0]) == _relay and len(frames) > 1:
                del frames[0]
                behind_relay.add(bytes(frames[0]))
            return frames

        def send_multipart(self, msg_parts: Any, *args: Any, **options: Any) -> Any:
            parts = list(msg_parts)
            if parts and bytes(parts[0]) in behind_relay:
                parts.insert(0, _relay)
            return super().send_multipart(parts, *args, **options)

    behind_relay: set[bytes] = set()
    init_sockets: Any = IPKernelApp.init_sockets
    make_socket: Any = zmq.Context.socket

    def without_hop(context: Any, kind: int, *args: Any, **options: Any) -> Any:
        if kind == zmq.ROUTER:
            options["socket_class"] = Router
        elif kind == zmq.XPUB:
            options["socket_class"] = backpressure.Publisher
        return make_socket(context, kind, *args, **options)

    def init_sockets_without_hop(app: IPKernelApp) -> None:
        zmq.Context.socket = without_hop  # type: ignore[method-assign, assignment]
        try:
            init_sockets(app)
        finally:
            zmq.Context.socket = make_socket  # type: ignore[method-assign]

    def bind_channel(app: IPKernelApp, zmq_socket: zmq.Socket[bytes], port: int) -> int:
        # The application binds its channels one by one and tells them apart by port.
        ports = {app.shell_port: "shell", app.stdin_port: "stdin", app.control_port: "control"}
        channel = ports.get(port, "iopub")
        if channel == "iopub":
            zmq_socket.setsockopt(zmq.XPUB_NODROP, 1)
            zmq_socket.setsockopt(zmq.SNDHWM, backpressure.MESSAGES)
        adopt(zmq_socket, channel, f"ipc://{app.ip}-vsock-{port}")
        if channel == "shell":
            # The debugger talks to the shell channel from inside, by the address that was bound last.
            zmq_socket.bind(f"ipc://{app.ip}-{port}")
        return port

    def bind_heartbeat(heartbeat: Heartbeat) -> None:
        adopt(heartbeat.socket, "hb", f"ipc://{heartbeat.ip}-vsock-{heartbeat.port}")

    IPKernelApp.init_sockets = init_sockets_without_hop  # type: ignore[method-assign]
    IPKernelApp._try_bind_socket = bind_channel  # type: ignore[method-assign]
    Heartbeat._try_bind_socket = bind_heartbeat  # type: ignore[method-assign]


def stand_by() -> None:
    """Has the kernel stand by in a template, if that is what the agent wants."""
    if _standby:
        sys.path.insert(0, _OWN)
        import standby

        sys.path.remove(_OWN)
        del sys.modules["standby"]
        standby.arm(_standby["fd"], _standby["modules"])


def main() -> None:
    """Adopts the listeners and becomes the kernel."""
    take_listeners()
    restore_path()
    patch()
    end_copies()
    keep_interrupts()
    stand_by()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
