"""The agent's part of a template: a kernel that stands by, and the wait for the restore.

When the guest's kernel was asked for a template (TEMPLATE_WORD), the agent starts the kernel that most
people want, has it warm up, and says so on the console. The host then stops and saves the VM. Every clone
goes on from there: a line on the console tells that the vsock device has been plugged in, which Linux is made
to look for (without ACPI nothing else would tell it).
"""

from __future__ import annotations

import json
import os
import socket

import system
from agent_protocol import STANDBY_ARGV, STANDBY_VARIABLE, TEMPLATE_WORD, WARM, can_adopt
from children import Children
from kernel_process import KernelProcess, Order
from settings import Settings

_LONGEST_LINE = 65536


class Standby:
    """The kernel that stands by."""

    def __init__(self, children: Children, settings: Settings, modules: list[str]) -> None:
        """Starts it.

        Args:
            children: where it is started.
            settings: its user and places.
            modules: that it imports before it is warm.

        Raises:
            OSError: it cannot be executed.
        """
        self._home = settings.home
        self._line, theirs = socket.socketpair()
        with theirs:
            wish = json.dumps({"fd": theirs.fileno(), "modules": modules})
            order = Order(STANDBY_ARGV, {STANDBY_VARIABLE: wish}, settings.home, _throw_away())
            self._kernel = KernelProcess(children, settings, order, (theirs.fileno(),))

    def until_ready(self) -> bool:
        """Blocks until the kernel is ready for the next step; False when it has ended instead."""
        return b"\n" in self._line.recv(_LONGEST_LINE)

    def adopt(self, order: Order) -> KernelProcess | None:
        """Makes the kernel the one that is ordered; None when it cannot become that, and is gone."""
        if can_adopt(order.argv, order.env) and os.path.isdir(order.cwd) and self._become(order, False):
            self._line.close()
            return self._kernel
        self.end()
        return None

    def rehearse(self) -> bool:
        """Makes the kernel nobody's, and has it warm up once more; False when it has ended over that."""
        if self._become(Order(STANDBY_ARGV, {}, self._home, _throw_away()), True):
            return True
        self.end()
        return False

    def end(self) -> None:
        """Ends the kernel; another one may be started then."""
        self._line.close()
        self._kernel.end()

    def _become(self, order: Order, rehearsal: bool) -> bool:
        self._kernel.rename(order.connection)
        wish = {"env": order.env, "cwd": order.cwd, "connection": order.connection, "rehearsal": rehearsal}
        try:
            self._line.sendall(json.dumps(wish).encode() + b"\n")
            return self.until_ready()
        except OSError:
            return False  # it is dead


def _throw_away() -> dict[str, object]:
    """The identity of a kernel that nobody has asked for yet."""
    return {"key": os.urandom(32).hex(), "signature_scheme": "hmac-sha256"}


def modules_wanted(command_line: str) -> list[str] | None:
    """What a template is to import, by the kernel's command line; None when none is asked for."""
    for word in command_line.split():
        if word.startswith(TEMPLATE_WORD):
            modules = json.loads(bytes.fromhex(word.removeprefix(TEMPLATE_WORD)))["modules"]
            assert isinstance(modules, list)
            return [str(module) for module in modules]
    return None


def await_restore(console: str = "/dev/console") -> None:
    """Says that the VM may be saved; after the restore and a line from the host, finds the new device."""
    with open(console, "r+b", buffering=0) as terminal:
        terminal.write(WARM.encode() + b"\n")
        terminal.read(_LONGEST_LINE)
    system.write("/sys/bus/pci/rescan", "1")
