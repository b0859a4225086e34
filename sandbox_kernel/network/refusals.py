"""What the network of a VM refused: one note for each in a file, one sentence for each place in each cell."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from sandbox_kernel.logfile import LogFile
from sandbox_kernel.network.ruleset import (
    ASKED_TOO_MUCH,
    CROWDED,
    DENIED,
    INVALID,
    LOOPING,
    OTHER_DNS,
    PRIVATE,
    SPOOFED,
    UNLISTED,
)
from sandbox_kernel.policy import Policy

FILE = "network.log"
"""In the folder of a VM's logs: a JSON object a line, with time, cell, destination, rule."""

_SENTENCES = 8
"""In one cell."""
_MOST = 256
"""Places that are remembered of one cell."""

_REASONS = {
    INVALID: "it is part of no connection, and begins none",
    SPOOFED: "it did not come from the guest's own address",
    LOOPING: "nothing of the host is to be reached there; name a port in `host_services`",
    OTHER_DNS: "the only DNS server is the one in /etc/resolv.conf",
    CROWDED: "too many connections are open (`network_connections`)",
    PRIVATE: "the address is private, or special; name its network in `network_allow`",
    UNLISTED: "no rule allows it; name it in `network_allow`",
    ASKED_TOO_MUCH: "too many questions were asked of the DNS server",
    "name": "no rule allows this name; add it to `network_allow`",
    "denied-name": "`network_deny` has this name",
    "rebinding": "its answer points to a private address",
}


class Refusals:
    """The refusals of one VM."""

    def __init__(self, folder: Path) -> None:
        """Nothing was refused yet; `folder` is that of the VM's logs."""
        self._file = LogFile(folder / FILE)
        self._file.setFormatter(logging.Formatter("%(message)s"))
        self._cell: Callable[[], str] = str
        self._tell: Callable[[str], None] = lambda said: None
        self._told_in = ""
        self._told: set[str] = set()
        self.policy = Policy()
        """The one that is in force, for the words of its rules."""

    def report_to(self, cell: Callable[[], str], tell: Callable[[str], None]) -> None:
        """Who is told from now on.

        Args:
            cell: id of the cell that runs; empty when none does.
            tell: gets a sentence for whoever runs it.
        """
        self._cell, self._tell = cell, tell

    def note(self, why: str, destination: str, name: str = "") -> None:
        """Notes one.

        Args:
            why: the filter's note, or `name`, `denied-name`, `rebinding` of the resolver's.
            destination: address or name, for people.
            name: what the guest knows the address by, if that is known.
        """
        cell, place = self._cell(), f"{destination} [{name}]" if name else destination
        reason = self._reason(why)
        line = {
            "time": round(time.time(), 3),
            "cell": cell,
            "destination": place,
            "rule": why,
            "reason": reason,
        }
        self._file.emit(logging.LogRecord("", logging.INFO, "", 0, json.dumps(line), None, None))
        if cell != self._told_in:
            self._told_in, self._told = cell, set()
        if not cell or place in self._told or len(self._told) >= _MOST:
            return
        self._told.add(place)
        if len(self._told) <= _SENTENCES:
            self._tell(f"The network policy ({self.policy.mode}) refused {place}: {reason}.")
        elif len(self._told) == _SENTENCES + 1:
            self._tell("The network policy refused more; `sandbox-kernel logs --network` shows all of it.")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _reason(self, why: str) -> str:
        if why.startswith(DENIED):
            number = why.removeprefix(DENIED)
            rules = self.policy.deny
            rule = rules[int(number)].text if number.isdigit() and int(number) < len(rules) else "a rule"
            return f"`network_deny` has {rule}"
        return _REASONS.get(why, "no rule allows it")
