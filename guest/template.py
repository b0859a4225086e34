"""The agent's part of a template: a kernel that stands by, and the wait for the restore.

When the guest's kernel was asked for a template (TEMPLATE_WORD), the agent starts the kernel that most
people want, has it warm up, and says so on the console. The host then stops and saves the VM. Every clone
goes on from there: a line on the console tells that the vsock device has been plugged in, which Linux is made
to look for (without ACPI nothing else would tell it).
"""

from __future__ import annotations

import gc
import json
import os
import socket
import time

import system
from agent_protocol import JIFFIES, STANDBY_ARGV, STANDBY_VARIABLE, TEMPLATE_WORD, WARM, can_adopt, pack
from cgroup import PIDS
from children import Children
from kernel_process import KernelProcess, Order
from network import Network
from server import Server
from settings import Settings

_LONGEST_LINE = 4096
_CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
_REHEARSALS = 5
"""Python specialises code from its second run on, and what that calls a little later."""


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
        self._home = self._at = settings.home
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
        possible = can_adopt(order.argv, order.env) and (order.cwd == self._at or os.path.isdir(order.cwd))
        if possible and self._become(order, False):
            self._line.detach()  # the kernel hangs up when it has time; here it costs more than it holds
            return self._kernel
        self.end()
        return None

    def leave_home(self) -> None:
        """Another file system lies over the folder that the kernel is in: it has to go there anew."""
        self._at = ""

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
        cwd = None if order.cwd == self._at else order.cwd  # where it is already
        wish = {"env": order.env, "cwd": cwd, "connection": order.connection, "rehearsal": rehearsal}
        try:
            self._line.sendall(json.dumps(wish).encode() + b"\n")
            return self.until_ready()
        except OSError:
            return False  # it is dead


def _throw_away() -> dict[str, object]:
    """The identity of a kernel that nobody has asked for yet."""
    return {"key": os.urandom(32).hex(), "signature_scheme": "hmac-sha256"}


class Wish:
    """What a template is to be.

    Attributes:
        modules: Python modules that its kernel imports.
        network: its network device's addresses; None where there is no device.
    """

    def __init__(self, word: str) -> None:
        """Takes a word of the kernel's command line."""
        wish = json.loads(bytes.fromhex(word.removeprefix(TEMPLATE_WORD)))
        self.modules = [str(module) for module in wish["modules"]]
        self.network = Network(wish["network"]) if "network" in wish else None


def wish(command_line: str) -> Wish | None:
    """What template is asked for by the kernel's command line; None when none is."""
    for word in command_line.split():
        if word.startswith(TEMPLATE_WORD):
            return Wish(word)
    return None


def rehearse(server: Server) -> bool:
    """Has the agent do what a clone's agent will do; False when the kernel has ended over it.

    Python makes code fast that runs often, and the dynamic linker resolves what is called first. Both is done
    once here instead of in every clone.
    """
    ours, theirs = socket.socketpair()
    with ours:
        for _ in range(_REHEARSALS):
            configuration = {"clock": time.time_ns(), "hostname": socket.gethostname(), "pids": PIDS}
            request: dict[str, object] = {"op": "rehearse", "configuration": configuration}
            ours.sendall(pack(request, os.urandom(64)))
        ours.shutdown(socket.SHUT_WR)
        server.serve(theirs)
        return ours.makefile("rb").read().count(b'"ok":true') == _REHEARSALS


def await_restore(console: str = "/dev/console") -> None:
    """Says that the VM may be saved; after the restore and a line from the host, finds the new device.

    What comes after the restore is run once, by an emulator that has to translate it: all is open, nothing is
    closed, the terminal neither edits nor echoes, and no garbage is looked for in what lives as long as this.
    """
    import tty  # which no other start needs

    import immortal

    rescan = os.open("/sys/bus/pci/rescan", os.O_WRONLY | os.O_CLOEXEC)
    terminal = os.open(console, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(terminal)
    gc.collect()
    immortal.immortalise()
    gc.freeze()
    if "jiffies" in system.read(_CLOCK):
        os.write(terminal, JIFFIES.encode() + b"\r\n")
    os.write(terminal, WARM.encode() + b"\r\n")
    os.read(terminal, 1)
    os.write(rescan, b"1")
