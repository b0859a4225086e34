"""Short words for what tests say to a kernel and hear from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_client import BlockingKernelClient

from tests.relay.rig import READY

Message = dict[str, Any]


@dataclass
class Heard:
    """What came on iopub for one request."""

    messages: list[Message] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [message["msg_type"] for message in self.messages]

    @property
    def stdout(self) -> str:
        return "".join(
            message["content"]["text"] for message in self.messages if message["msg_type"] == "stream"
        )

    @property
    def shown(self) -> list[str]:
        return [
            message["content"]["data"]["text/plain"]
            for message in self.messages
            if message["msg_type"] in ("display_data", "execute_result")
        ]

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message["msg_type"] == kind]


def is_idle(message: Message) -> bool:
    return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


def is_stream(message: Message) -> bool:
    return message["msg_type"] == "stream"


def hear(client: BlockingKernelClient, request: str, until: Callable[[Message], bool] = is_idle) -> Heard:
    """Listens on iopub to what belongs to `request`, up to a message that `until` accepts."""
    heard = Heard()
    while True:
        message = client.get_iopub_msg(timeout=READY)
        if message["parent_header"].get("msg_id") == request:
            heard.messages.append(message)
            if until(message):
                return heard


def answer(client: BlockingKernelClient, request: str, channel: str = "shell") -> Message:
    """The reply to `request`."""
    while True:
        message: Message = getattr(client, f"{channel}_channel").get_msg(timeout=READY)
        if message["parent_header"].get("msg_id") == request:
            return message


def run(client: BlockingKernelClient, code: str) -> Heard:
    """Executes `code`; all that came on iopub."""
    request = client.execute(code)
    heard = hear(client, request)
    assert answer(client, request)["content"]["status"] == "ok", heard.messages
    return heard


def ask(client: BlockingKernelClient, kind: str, channel: str, content: dict[str, Any] | None = None) -> str:
    """Sends a request of any type; its message id."""
    message = client.session.msg(kind, content or {})
    getattr(client, f"{channel}_channel").send(message)
    request: str = message["header"]["msg_id"]
    return request
