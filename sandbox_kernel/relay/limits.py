"""How much the relay takes from a guest, keeps for a client, and waits; one frozen record.

What bounds what (details where each is enforced):

    guest → relay     bytes and frames of a message, while it arrives (zmtp.py); nothing is queued: a message
                      is passed on or the guest waits
    relay → client    messages per client (libzmq's high-water mark) and bytes per channel (outlet.py)
    client → relay    messages per client (high-water mark); then the client's own socket fills up
    relay → guest     bytes that the guest has not taken; then the clients of that channel wait
    for the report    requests that are remembered as unanswered (pending.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_MIB: Final = 1 << 20
_LARGE: Final = ("shell", "iopub")
"""Channels on which a user's data travels."""


def _message_bytes() -> Mapping[str, int]:
    return MappingProxyType(
        {
            "shell": 256 * _MIB,
            "iopub": 256 * _MIB,
            "control": 32 * _MIB,
            "stdin": 4 * _MIB,
        }
    )


@dataclass(frozen=True)
class RelayLimits:
    """Bounds of one relay.

    Attributes:
        message_bytes: the largest message taken from the guest, by channel, all its frames together.
        message_frames: frames of one message from the guest; a widget's message has one for each buffer.
        identities: frames in front of a message's delimiter.
        guest_unread_bytes: what may wait for the guest on one channel before its clients have to wait.
        client_messages: messages that wait for one client before further ones are dropped for it. A stock
            kernel has 1000; the relay has more, because it may get a burst out of the guest's buffers that
            the kernel wrote at leisure.
        client_bytes: large frames that wait for slow clients on one channel before the guest has to wait.
        stall: seconds in which such a wait must get shorter; after that, the connections that take nothing
            are cut.
        requests: unanswered requests that are remembered for a death report.
        linger: seconds in which the last messages may still reach clients after the end, as in ipykernel.
        retry: seconds between attempts to connect to the guest.
        welcome: seconds to wait for the guest's iopub_welcome; kernels older than JEP 65 send none.
        initialised: seconds to wait until a kernel that accepts connections can answer; a user's start-up
            files, which run before, may take longer.
        last_words: seconds in which a dead guest's last outputs are still taken.
        output_bytes: that one cell may put out; 0: any number.
        message_rate: messages on iopub a second that are taken from the guest; 0: any number.
    """

    message_bytes: Mapping[str, int] = field(default_factory=_message_bytes)
    message_frames: int = 4096
    identities: int = 8
    guest_unread_bytes: int = 1 * _MIB
    client_messages: int = 4096
    client_bytes: int = 256 * _MIB
    stall: float = 1.0
    requests: int = 1024
    linger: float = 1.0
    retry: float = 0.02
    welcome: float = 0.5
    initialised: float = 10.0
    last_words: float = 0.25
    output_bytes: int = 0
    message_rate: float = 0.0

    @classmethod
    def of(cls, output: float, message_size: float, message_rate: float) -> RelayLimits:
        """The bounds for a user's limits: MiB of output a cell, MiB of a message, messages a second."""
        largest = round(message_size * _MIB)
        return cls(
            {
                channel: min(usual, largest) if channel not in _LARGE else largest
                for channel, usual in _message_bytes().items()
            },
            output_bytes=round(output * _MIB),
            message_rate=message_rate,
        )
