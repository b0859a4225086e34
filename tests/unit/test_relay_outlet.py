"""When the guest waits for slow clients, and when a client is cut."""

from __future__ import annotations

from sandbox_kernel.relay.outlet import Outlet, Verdict


class Frame:
    def __init__(self) -> None:
        self.released = False

    def __call__(self) -> bool:
        return self.released


def outlet(frames: int) -> tuple[Outlet, list[Frame]]:
    """An outlet of 100 bytes on whose way are frames of 30 bytes."""
    made, sent = Outlet(limit=100, stall=1.0), [Frame() for _ in range(frames)]
    for frame in sent:
        made.sent(30, frame)
    return made, sent


def test_up_to_the_limit_all_flows() -> None:
    assert outlet(3)[0].verdict(0.0) is Verdict.FLOW


def test_released_frames_do_not_count() -> None:
    made, sent = outlet(4)
    sent[2].released = True
    assert made.verdict(0.0) is Verdict.FLOW


def test_over_the_limit_the_guest_waits_until_half_of_it_is_left() -> None:
    made, sent = outlet(4)
    assert made.verdict(0.0) is Verdict.WAIT
    sent[0].released = sent[1].released = True
    assert made.verdict(0.5) is Verdict.WAIT
    sent[2].released = True
    assert made.verdict(0.6) is Verdict.FLOW
    made.sent(30, Frame())
    assert made.verdict(0.7) is Verdict.FLOW


def test_as_long_as_something_moves_nobody_is_cut() -> None:
    made, sent = outlet(40)
    for step, frame in enumerate(sent[:30]):
        assert made.verdict(step * 0.9) is Verdict.WAIT
        frame.released = True


def test_when_nothing_moves_the_stalled_are_cut_once_per_stall() -> None:
    made, _ = outlet(4)
    assert [made.verdict(time) for time in (0.0, 0.9, 1.0, 1.1, 2.0)] == [
        Verdict.WAIT,
        Verdict.WAIT,
        Verdict.CUT,
        Verdict.WAIT,
        Verdict.CUT,
    ]
