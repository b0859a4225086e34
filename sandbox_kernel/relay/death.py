"""What the relay says in a kernel's place after its death: the truth, to everyone who waits for an answer.

For each unanswered request, in this order as a kernel would send them:

    iopub   `error`, for cells (an `execute_request`), so that the notebook shows why
    shell or control   the `…_reply` with status `error`
    iopub   `status: idle`, which ends the request for clients that wait for it

All carry the request's header as parent and are signed with the session's key.

Where the user's own code has ended the kernel (`exit`, `os.kill`), cells get no reply, as from any kernel:
by that, clients tell "the kernel died" from "the cell failed" (nbclient's DeadKernelError).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from sandbox_kernel.relay.message import Author
from sandbox_kernel.relay.pending import EXECUTE, Unanswered
from sandbox_kernel.relay.zmtp import Frame

ERROR_NAME: Final = "KernelDied"


def report(
    unanswered: Iterable[Unanswered], reason: str, author: Author, reply_to_cells: bool
) -> Iterator[tuple[str, list[Frame]]]:
    """The messages that tell `reason`, a sentence for the user: pairs of channel and frames."""
    error = {"ename": ERROR_NAME, "evalue": reason, "traceback": [reason]}
    for each in unanswered:
        request = each.request
        content: dict[str, Any] = {"status": "error", **error}
        if request.kind == EXECUTE:
            content |= {"execution_count": each.execution_count, "user_expressions": {}, "payload": []}
            yield "iopub", [_topic(author, "error"), *author.message("error", error, request.header)]
        if request.kind != EXECUTE or reply_to_cells:
            kind = request.kind.removesuffix("_request") + "_reply"
            yield request.channel, [*request.identities, *author.message(kind, content, request.header)]
        idle = author.message("status", {"execution_state": "idle"}, request.header)
        yield "iopub", [_topic(author, "status"), *idle]


def _topic(author: Author, kind: str) -> bytes:
    return f"kernel.{author.session}.{kind}".encode()
