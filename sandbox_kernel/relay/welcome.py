"""The welcome of iopub (JEP 65): a subscriber is told that from now on it misses nothing.

A kernel sends `iopub_welcome` when a subscription arrives. Behind the relay the kernel has one subscriber for
ever, the relay, which subscribes to everything before it passes the first request on; so the kernel's own
welcome ends here, and each client's subscription is welcomed by the relay when it is in force in the relay's
own XPUB. As with a kernel, whoever has the same topic sees the message, too.
"""

from __future__ import annotations

from typing import Final

from sandbox_kernel.relay.message import Author
from sandbox_kernel.relay.zmtp import Frame

KIND: Final = "iopub_welcome"

_TOPIC_BYTES: Final = 1024


def welcome(event: bytes, author: Author) -> list[Frame] | None:
    """The answer to what an XPUB reports: 01 and a topic is a subscription; None for all else."""
    if event[:1] != b"\x01" or len(event) > _TOPIC_BYTES:
        return None
    topic = event[1:]
    try:
        message = author.message(KIND, {"subscription": topic.decode()})
    except UnicodeDecodeError:
        return None
    return [topic, *message] if topic else message
