"""The limits of a cell's output and of its rate."""

from __future__ import annotations

import json
from typing import Any

from jupyter_client.session import Session

from sandbox_kernel.relay.message import Author, Signer, find_delimiter
from sandbox_kernel.relay.outputs import MIB, Allowance, Pace

KEY = b"key"
AUTHOR = Author(Signer(KEY, "hmac-sha256"))
CELL = b'{"msg_id": "cell"}'


def frames(kind: str, content: dict[str, Any], parent: str = "cell") -> list[bytes]:
    session = Session(key=KEY)
    message = session.msg(kind, content, parent={"msg_id": parent})  # type: ignore[arg-type]
    return [b"topic", *session.serialize(message)]


def stream(text: str, **options: Any) -> list[bytes]:
    return frames("stream", {"name": "stdout", "text": text}, **options)


def admitted(allowance: Allowance, sent: list[bytes]) -> list[dict[str, Any]]:
    at = find_delimiter(sent, 8)
    assert at is not None
    messages = []
    for passed in allowance.admit(sent, at, AUTHOR, CELL):
        _, rest = Session(key=KEY).feed_identities(list(map(bytes, passed)))
        messages.append(Session(key=KEY).deserialize(rest))
    return messages


def test_output_within_the_limit_passes_untouched() -> None:
    sent = stream("x" * 1000)
    assert Allowance(MIB).admit(sent, 1, AUTHOR, CELL) == [sent]


def test_a_streams_text_is_cut_at_the_limit_and_one_notice_says_so() -> None:
    allowance = Allowance(MIB)
    cut, notice = admitted(allowance, stream("é" * MIB))
    assert MIB - 1000 < len(cut["content"]["text"].encode()) <= MIB + len("…\n".encode())
    assert set(cut["content"]["text"]) == {"é", "…", "\n"}
    assert notice["content"]["name"] == "stderr"
    assert notice["content"]["text"] == (
        "[sandbox-kernel] The output limit of 1 MiB a cell was reached, the rest of this cell's output is "
        "left out; put out less, or raise `output`.\n"
    )
    assert notice["parent_header"]["msg_id"] == "cell"
    assert admitted(allowance, stream("more")) == []


def test_what_is_no_stream_is_left_out_whole() -> None:
    data = {"data": {"text/plain": "x" * MIB}, "metadata": {}}
    [notice] = admitted(Allowance(MIB), frames("display_data", data))
    assert notice["msg_type"] == "stream"


def test_a_cells_state_passes_beyond_the_limit_as_long_as_it_is_small() -> None:
    allowance = Allowance(1)
    admitted(allowance, stream("x"))
    error = {"ename": "E", "evalue": "v", "traceback": ["t"]}
    assert [m["msg_type"] for m in admitted(allowance, frames("error", error))] == ["error"]
    assert [m["msg_type"] for m in admitted(allowance, frames("status", {"execution_state": "idle"}))]
    assert admitted(allowance, frames("error", error | {"evalue": "x" * 100_000})) == []


def test_no_parent_that_a_kernel_names_gives_it_more() -> None:
    allowance = Allowance(MIB)
    for number in range(3):
        admitted(allowance, stream("x" * (MIB // 2), parent=f"cell {number}"))
    assert admitted(allowance, stream("x", parent="another")) == []


def test_a_new_cell_has_its_own_allowance() -> None:
    allowance = Allowance(MIB)
    admitted(allowance, stream("x" * 2 * MIB))
    allowance.renew()
    assert [m["content"]["text"] for m in admitted(allowance, stream("x"))] == ["x"]


def test_a_stream_that_is_no_json_is_left_out() -> None:
    sent = stream("x" * MIB)
    sent[-1] = b"[" * MIB
    assert len(Allowance(MIB).admit(sent, 1, AUTHOR, CELL)) == 1
    sent[-1] = json.dumps(["x" * MIB]).encode()
    assert len(Allowance(MIB).admit(sent, 1, AUTHOR, CELL)) == 1


def test_a_pace_lets_a_burst_pass_and_then_its_rate() -> None:
    pace = Pace(10)
    assert [pace.delay(100.0) for _ in range(10)] == [0.0] * 10
    assert round(pace.delay(100.0), 3) == 0.1
    assert pace.delay(101.0) == 0.0


def test_over_a_minute_no_more_than_the_rate_passes() -> None:
    pace, now, count = Pace(10), 0.0, 0
    while now < 60:
        now += pace.delay(now)
        count += 1
    assert 600 <= count <= 612
