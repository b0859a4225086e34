"""What a guest's network tells, as hypothesis makes it up: the steps of the target `network`.

`python -m pytest tests/fuzz` is quick; `python -m pytest tests/fuzz -m fuzz` runs long.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.script import write
from tests.fuzz.targets import network
from tests.fuzz.targets.network import (
    ANSWER,
    ATTRIBUTES,
    BEGIN,
    BYTES,
    CELL,
    DATAGRAM,
    LINE,
    POLICY,
    TIME,
    WORDS,
)

small = st.integers(0, 9)
number = st.one_of(small, st.integers(0, 255), st.integers(0, 2**64 - 1))
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6), st.just(" ")), max_size=30).map(
    "".join
)
names = st.one_of(texts.map(lambda text: text.encode()), st.binary(max_size=70))
lines = texts.map(lambda text: f"{BEGIN}{text}\n".encode())
steps = st.one_of(
    st.tuples(st.just(DATAGRAM), st.binary(max_size=300)),
    st.tuples(st.just(ATTRIBUTES), small, small, st.binary(max_size=60), *[number] * 16),
    st.tuples(st.just(BYTES), st.one_of(names, lines, st.just(b"x" * 3000)), number),
    st.tuples(st.just(LINE), small, small, *[st.integers(0, len(WORDS) - 1)] * 9, number),
    st.tuples(st.just(ANSWER), small, names, small, small, small, number, number),
    st.tuples(st.just(CELL)),
    st.tuples(st.just(POLICY), small),
    st.tuples(st.just(TIME), small),
)
scripts = st.lists(steps, max_size=40).map(lambda found: b"".join(write(*step) for step in found))


def run_one(script: bytes) -> None:
    with network.fuzzing() as run:
        run(script)


@settings(max_examples=150)
@given(scripts)
def test_whatever_a_network_tells_stays_within_bounds(script: bytes) -> None:
    run_one(script)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=20_000)
@given(scripts)
def test_whatever_a_network_tells_stays_within_bounds_for_long(script: bytes) -> None:
    run_one(script)
