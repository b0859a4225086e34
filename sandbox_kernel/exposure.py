"""A port of a guest on the host, as a person writes it: `GUEST`, `GUEST:PORT` or `GUEST:/SOCKET`.

    8888                    on the host's loopback, at a port that the system chooses
    8888:9000               at port 9000 there
    8888:{cwd}/app.sock     at a Unix socket, for this user alone

GUEST is the port in the guest, as its programs listen on it; PORT is the host's, 0 for any. `{cwd}` and
`{notebook_dir}` are what they are in a mount (mount.py).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sandbox_kernel.errors import ConfigurationError

PATTERN = r"[0-9]{1,5}(:([0-9]{1,5}|(/|\{(cwd|notebook_dir)\})[^\0-\x1f]*))?"
"""What an exposed port looks like; see `parse` for what it must be."""
MOST = 16
"""Ports that a VM may have exposed, whatever the administrator says."""

_LAST_PORT = 65535
_LONGEST_PATH = 107
"""Bytes (unix(7))."""


@dataclass(frozen=True)
class Exposure:
    """One port of a guest, with nothing left to be filled in.

    Attributes:
        guest: the port in the guest.
        port: of the host's loopback; 0: the system chooses one. None where there is a socket instead.
        path: of a Unix socket of the host; empty where there is a port.
    """

    guest: int
    port: int | None = 0
    path: str = ""

    def __str__(self) -> str:
        """The text that this is parsed from."""
        return f"{self.guest}:{self.path or self.port}" if self.path or self.port else f"{self.guest}"

    @property
    def address(self) -> str:
        """Where it is reached on the host."""
        return self.path or f"127.0.0.1:{self.port}"

    def at(self, port: int) -> Exposure:
        """The same with the port that the system has chosen."""
        return dataclasses.replace(self, port=port)

    def to_dict(self) -> dict[str, int | str]:
        """For people and programs, as JSON's types: `port` of the guest, and `address` on the host."""
        return {"port": self.guest, "address": self.address}


def parse(text: str) -> Exposure:
    """The exposure that `text` describes.

    Raises:
        ConfigurationError: it describes none.
    """
    guest, _, host = text.partition(":")
    if not re.fullmatch(PATTERN, text) or host.startswith("{") or not _is_path(host):
        raise ConfigurationError(
            f"{text[:200]!r} exposes no port; write GUEST, GUEST:PORT or GUEST:/SOCKET, such as 8888:9000."
        )
    if not 1 <= int(guest) <= _LAST_PORT or (host.isdigit() and int(host) > _LAST_PORT):
        raise ConfigurationError(
            f"{text!r} names a port that there is not; those of the guest are 1 to {_LAST_PORT}, those of "
            f"the host 0 (any) to {_LAST_PORT}."
        )
    if not host or host.isdigit():
        return Exposure(int(guest), int(host or 0))
    if len(os.fsencode(host)) > _LONGEST_PATH:
        raise ConfigurationError(
            f"The socket {host[:80]}… for port {guest} has a path of over {_LONGEST_PATH} bytes, which is "
            "the most; choose a shorter one."
        )
    return Exposure(int(guest), None, host)


def fill_in(texts: Iterable[str], places: Mapping[str, str]) -> tuple[str, ...]:
    """`texts` with `{cwd}` and `{notebook_dir}` replaced by what `places` has for them."""
    return tuple(
        re.sub(r"(?<=:)\{(cwd|notebook_dir)\}", lambda found: places[found[1]], text) for text in texts
    )


def check(exposures: Sequence[Exposure], most: int | None) -> None:
    """Whether a VM may have all of these.

    Args:
        exposures: of one VM.
        most: how many the administrator allows (`max_expose`); None: as many as there can be.

    Raises:
        ConfigurationError: it may not.
    """
    if most is not None and len(exposures) > most:
        raise ConfigurationError(
            f"Ports to be exposed: {len(exposures)}, over the administrator's limit max_expose = {most}; "
            + ("expose none." if most == 0 else f"expose {most} or fewer.")
        )
    if len(exposures) > MOST:
        raise ConfigurationError(f"A VM has at most {MOST} exposed ports; take one away first.")
    addresses = [each.address for each in exposures if each.port != 0]
    for address in addresses:
        if addresses.count(address) > 1:
            raise ConfigurationError(
                f"Two ports are to be exposed at {address}; give each an address of its own."
            )


def _is_path(text: str) -> bool:
    """Whether a system call can take it: no half of a surrogate pair that stands for no byte."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
