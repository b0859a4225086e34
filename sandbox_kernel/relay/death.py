"""What the relay says in a kernel's place after its death: the truth, to everyone who waits for an answer.

For each unanswered request, in this order as a kernel would send them:

    iopub   `error`, for cells (an `execute_request`) that were running, so that the notebook shows why
    shell or control   the `…_reply` with status `error`; `aborted` for cells that had not begun
    iopub   `status: idle`, which ends the request for clients that wait for it

All carry the request's header as parent and are signed with the session's key. The record of the death, with
the seconds that the cell had run, is in the metadata of both `error` and reply, as `sandbox_kernel`.

Where the user's own code has ended the kernel (`exit`, `os.kill`), the running cell gets no reply, as from
any kernel: by that, clients tell "the kernel died" from "the cell failed" (nbclient's DeadKernelError).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sandbox_kernel.death import Death
from sandbox_kernel.relay.message import Author
from sandbox_kernel.relay.pending import EXECUTE, Unanswered
from sandbox_kernel.relay.zmtp import Frame


def report(
    unanswered: Iterable[Unanswered], death: Death, author: Author, now: float
) -> Iterator[tuple[str, list[Frame]]]:
    """The messages that tell of `death` at the time `now` (monotonic): pairs of channel and frames."""
    for each in unanswered:
        request = each.request
        if request.kind != EXECUTE:
            yield _reply(author, each, {"status": "error", **_error(death)})
        elif each.since is None:
            yield _reply(author, each, {"status": "aborted", "execution_count": 0})
        else:
            seconds = now - each.since
            error = _error(death, death.figures(seconds))
            record = {"sandbox_kernel": {**death.to_dict(), "cell_seconds": round(seconds, 3)}}
            metadata = json.dumps(record).encode()
            shown = author.message("error", error, request.header, metadata)
            yield "iopub", [author.topic("error"), *shown]
            if not death.by_user_code:
                content = {"execution_count": each.execution_count, "user_expressions": {}, "payload": []}
                yield _reply(author, each, {"status": "error", **error, **content}, metadata)
        idle = author.message("status", {"execution_state": "idle"}, request.header)
        yield "iopub", [author.topic("status"), *idle]


def _error(death: Death, figures: str = "") -> dict[str, Any]:
    traceback = [f"{death.name}: {death.message}", *([figures] if figures else [])]
    return {"ename": death.name, "evalue": death.message, "traceback": traceback}


def _reply(
    author: Author, to: Unanswered, content: dict[str, Any], metadata: bytes = b"{}"
) -> tuple[str, list[Frame]]:
    request = to.request
    kind = request.kind.removesuffix("_request") + "_reply"
    return request.channel, [*request.identities, *author.message(kind, content, request.header, metadata)]
