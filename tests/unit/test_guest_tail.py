"""What is kept of a kernel's standard output, and what the console gets of it."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from tail import _BURST, _CUT, _TAIL, Allowance, Tail


@given(
    st.integers(0, 1000),
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 10)), max_size=30),
)
def test_never_more_passes_than_burst_and_rate_allow(
    burst: int, rate: int, asked: list[tuple[int, float]]
) -> None:
    allowance, now, passed = Allowance(burst, rate, 0.0), 0.0, 0
    for count, later in asked:
        now += later
        granted = allowance.take(count, now)
        assert 0 <= granted <= count
        passed += granted
    assert passed <= burst + rate * now + 1


def test_after_a_silence_there_is_an_allowance_again() -> None:
    allowance = Allowance(10, 5, 0.0)
    assert [allowance.take(8, 0.0), allowance.take(8, 0.0), allowance.take(8, 1.0)] == [8, 2, 5]
    assert allowance.take(100, 1000.0) == 10


def test_a_flood_is_swallowed_its_end_kept_and_the_console_spared() -> None:
    reader, console = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    # A pipe takes 64 KiB, as much as the console's allowance, and the notice must not block.
    import fcntl

    fcntl.fcntl(console, fcntl.F_SETPIPE_SZ, 1 << 20)
    tail = Tail(console)
    with os.fdopen(os.dup(tail.writer), "wb") as kernel:
        tail.close_writer()
        kernel.write(b"x" * 3_000_000 + b"the end")
    assert tail.text(20) == "x" * (_TAIL - 7) + "the end"
    copied = os.read(reader, 1 << 20)
    os.close(console)
    os.close(reader)
    assert _BURST <= len(copied) < _BURST + 100 * len(_CUT) + 100_000
    assert _CUT in copied


def test_a_console_that_is_gone_is_no_reason_to_stop_reading() -> None:
    reader, console = os.pipe2(os.O_CLOEXEC)
    os.close(reader)
    tail = Tail(console)
    os.write(tail.writer, b"some")
    os.write(tail.writer, b"thing")
    tail.close_writer()
    assert tail.text(20) == "something"
    os.close(console)


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    tail = Tail(null)
    os.write(tail.writer, b"\xff\xfe ok")
    tail.close_writer()
    assert tail.text(20) == "�� ok"
    os.close(null)
