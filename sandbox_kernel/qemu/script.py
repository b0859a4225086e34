"""A clone's start over QMP: what it is to do when it is up lies in a socket of its own before QEMU starts.

So nobody has to be there when it comes up: QEMU sets its capability and loads the template's devices
(docs/interop/qmp-spec.rst). When it has said so, what cannot be in a template is plugged in, and the guest
runs. This is all of QMP that a start needs; the client for the VM's further life (machine/vmm.py) takes
longer to come up than QEMU.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

_SILENT = {"announce-rounds": 0}
"""A clone's link is new to the host, which has nothing to unlearn (docs of QMP, MigrationParameters)."""
CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_EVENTS = {"capabilities": [{"capability": "events", "state": True}]}
_LAST = "last"
_NIC = "nic"
_MOST = 65536
_WORDS = 300


def script(state_fd: int, complete: bool = True) -> bytes:
    """Commands for a clone, which reads its devices from the descriptor `state_fd`.

    Where these are not `complete`, as of one that has to get a network device first, `Script.load` follows.
    """
    return (
        _command("qmp_capabilities", {})
        + _command("migrate-set-capabilities", CAPABILITIES)
        + _command("migrate-set-capabilities", _EVENTS)
        + (_load(state_fd) if complete else _command("migrate-set-parameters", _SILENT))
    )


class Script:
    """Our end of a clone's script."""

    def __init__(self, connection: socket.socket) -> None:
        """Talks over `connection`, which does not block and stays the caller's."""
        self._connection = connection
        self._read = 0
        self._rest = b""
        self.loaded = False
        """Whether the devices are loaded."""
        self.running = False
        """Whether the guest runs."""
        self.error = ""
        """What QEMU said when something did not go well."""
        self.refused = ""
        """What it said of what it was to `connect`."""

    def plug_in(self, device: Mapping[str, str | int]) -> None:
        """Plugs a device in, by `device_add`'s arguments, once all is `loaded`."""
        self._connection.send(_command("device_add", device))

    def connect(
        self, name: str, fd: int, backend: Mapping[str, str], device: Mapping[str, str | int]
    ) -> None:
        """Gives QEMU the descriptor `fd` by a name, and plugs in a network device that uses it."""
        socket.send_fds(self._connection, [_command("getfd", {"fdname": name}, _NIC)], [fd])
        self._connection.send(_command("netdev_add", backend, _NIC))
        self._connection.send(_command("device_add", device, _NIC))

    def load(self, state_fd: int) -> None:
        """Has it read its devices, where the script did not."""
        self._connection.send(_load(state_fd))

    def go_on(self) -> None:
        """Lets the guest run; it does when it is `running`."""
        self._connection.send(_command("cont", {}, _LAST))

    def look(self) -> None:
        """Takes what QEMU has said; the attributes then tell what is known."""
        try:
            while data := self._connection.recv(4096):
                self._read += len(data)
                if self._read > _MOST:
                    self.error = f"it said more than {_MOST} bytes"
                    return
                self._rest += data
        except OSError:  # nothing more there yet, or QEMU is gone
            pass
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._note(line)

    def _note(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
            failed = said.get("error")
            if failed is not None and said.get("id") == _NIC:
                # What comes after it fails because of it.
                self.refused, failed = self.refused or str(failed)[:_WORDS], None
            self.loaded |= said.get("event") == "MIGRATION" and said["data"]["status"] == "completed"
            self.running |= "return" in said and said.get("id") == _LAST
        except (ValueError, AttributeError, KeyError, TypeError):
            failed = "what it says is no QMP"
        if failed is not None:
            self.error = str(failed)[:_WORDS]


def _load(state_fd: int) -> bytes:
    return _command("migrate-incoming", {"uri": f"fd:{state_fd}"})


def _command(name: str, arguments: Mapping[str, Any], tag: str = "start") -> bytes:
    return json.dumps({"execute": name, "arguments": arguments, "id": tag}).encode() + b"\n"
