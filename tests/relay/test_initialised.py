"""A kernel binds its channels before it reads them; the relay knows when it does."""

from __future__ import annotations

import pytest

from sandbox_kernel.relay.limits import RelayLimits
from tests.relay import hostile
from tests.relay.conftest import MakeRig
from tests.relay.rig import READY


def test_a_kernel_is_initialised_when_it_publishes_its_first_status(make_rig: MakeRig) -> None:
    rig = make_rig(limits=RelayLimits(initialised=10 * READY))
    rig.start()
    rig.thread.run(rig.relay.initialised())
    rig.thread.run(rig.relay.initialised())


def test_a_kernel_that_publishes_nothing_is_waited_for_so_long_and_no_longer(
    make_rig: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(limits=RelayLimits(initialised=0.05))
    with hostile.guest(rig, "iopub", hostile.speak(hostile.jupyter(kind="stream"))):
        rig.attach()
        with caplog.at_level("INFO"):
            rig.thread.run(rig.relay.initialised())
    assert "has not published a status yet" in caplog.text
