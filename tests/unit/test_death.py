"""The record of a kernel's death."""

from __future__ import annotations

import json

import pytest

from sandbox_kernel.death import Death
from sandbox_kernel.errors import GuestError, KernelCrashed, MemoryLimitExceeded


def test_a_limit_brings_its_figures_and_survives_json() -> None:
    death = Death.of(MemoryLimitExceeded("Too much.", 512, "MiB", 500.5), uptime=12.3456)
    assert (death.name, death.message, death.uptime) == ("MemoryLimitExceeded", "Too much.", 12.346)
    assert Death.from_dict(json.loads(json.dumps(death.to_dict()))) == death
    assert death.figures(2.04) == "limit 512 MiB, peak 500.5 MiB, cell 2.0 s, kernel 12.3 s"


def test_what_is_no_limit_has_no_figures() -> None:
    death = Death.of(KernelCrashed("The kernel's process was killed by SIGSEGV."))
    assert set(death.to_dict()) == {"name", "message", "uptime", "by_user_code"}
    assert Death.from_dict(death.to_dict()) == death


@pytest.mark.parametrize("record", [{}, {"name": "x"}, {"name": "x", "message": "y", "limit": "much"}])
def test_what_is_no_record_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(GuestError, match="malformed"):
        Death.from_dict(record)
