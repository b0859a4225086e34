"""Drives one kernel in the tests' world: a JSON object a line in, one out.

    {"start": {…}}          a kernel with this configuration, `max_network` the administrator's → {"ok": VM}
    {"cell": code}          → {"ok": what it printed} or {"error": …}
    {"ask": {…}}            what a VM's window is asked for (supervisor/window.py) → {"ok": answer}
    {"command": [name, …]}  → {"ok": what `sandbox-kernel NAME VM …` prints}
    {"log": name}           → {"ok": text of that file among the VM's logs}
    {"host": expression}    → {"ok": what it is in this program, which is on the world's host}
    {"shell": command, "environment": {…}}
                            → {"ok": what the command says on standard output} or {"error": …}
    {"neighbour": {…}, "runs": code}
                            one more kernel, until the next stop, which has run that cell → {"ok": VM}
    {"stop": true}          → {"ok": ""}

An error of any kind is `{"error": class, "message": text}`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sandbox_kernel.supervisor import remote
from tests.microvm import Kernel, microvm

_PATIENCE = 300.0
"""Seconds that a command may take which starts a kernel, on a busy machine."""


class Driver:
    """The kernel, if there is one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._kernel: Kernel | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        if "start" in request:
            widest = request["start"].pop("max_network", "")
            os.environ["SANDBOX_KERNEL_MAX_NETWORK"] = widest or "full"
            self._kernel = self._stack.enter_context(microvm(**request["start"]))
            return self._kernel.manager.provisioner.report["id"]
        if "stop" in request:
            self._stack.close()
            self._kernel = None
            return ""
        if "neighbour" in request:
            neighbour = self._stack.enter_context(microvm(**request["neighbour"]))
            neighbour.run(request["runs"])
            return neighbour.manager.provisioner.report["id"]
        if "host" in request:
            return eval(request["host"], {"driver": self, "listen": listen})
        if "shell" in request:
            return shell(request["shell"], request["environment"])
        assert self._kernel is not None
        if "cell" in request:
            return self._kernel.run(request["cell"])
        vm = self._kernel.manager.provisioner.report["id"]
        if "command" in request:
            name, *arguments = request["command"]
            words = [sys.executable, "-m", "sandbox_kernel.cli.main", name, vm, *arguments]
            return subprocess.run(words, capture_output=True, text=True, check=True).stdout
        if "ask" in request:
            return remote.ask(remote.find(vm), request["ask"])
        return Path(self._kernel.manager.provisioner.report["logs"], request["log"]).read_text()


def shell(command: str, environment: dict[str, str]) -> str:
    """What a user's command says on this world's host; it must succeed."""
    done = subprocess.run(
        ["sh", "-c", command],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,  # this program's own is the conversation
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def listen(address: str, port: int) -> str:
    """Has somebody listen on this world's host, who says which port was reached."""
    listener = socket.create_server((address, port))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.sendall(f"the host's {port}".encode())
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return address


def main() -> None:
    driver = Driver()
    for line in sys.stdin:
        try:
            said = {"ok": driver.answer(json.loads(line))}
        except Exception as error:
            said = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(said), flush=True)
    driver.answer({"stop": True})


if __name__ == "__main__":
    main()
