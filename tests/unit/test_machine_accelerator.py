"""Verdicts on KVM: kept, found again, and what they decide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_kernel.errors import AcceleratorError
from sandbox_kernel.machine import accelerator
from sandbox_kernel.machine.accelerator import Verdict

GOOD = Verdict(True, "the guest kernel booted in 0.5 s", 0.5)
BAD = Verdict(False, "QEMU ended", 0.1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "qemu"
    program.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(accelerator.bubblewrap, "find", lambda name, fix: program)
    monkeypatch.setattr(accelerator, "unavailable", lambda: None)
    return tmp_path / "sandbox-kernel" / "accelerators.json"


def image(digest: str) -> Any:
    return SimpleNamespace(digest=digest)


def test_each_image_has_a_verdict_of_its_own() -> None:
    accelerator.keep(GOOD, image("a"))
    accelerator.keep(BAD, image("b"))
    assert accelerator.cached(image("a")) == GOOD
    assert accelerator.cached(image("b")) == BAD
    assert accelerator.cached(image("c")) is None


def test_the_latest_are_kept() -> None:
    for number in range(40):
        accelerator.keep(GOOD, image(str(number)))
    assert [n for n in range(40) if accelerator.cached(image(str(n)))] == list(range(24, 40))


@pytest.mark.parametrize("text", ["", "[]", "no json", '{"x": 3}'])
def test_a_damaged_cache_is_none(own_cache: Path, text: str) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(text)
    assert accelerator.cached(image("a")) is None
    accelerator.keep(GOOD, image("a"))
    assert accelerator.cached(image("a")) == GOOD


def test_what_a_verdict_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.settle("auto", image("a")) is None
    assert accelerator.settle("tcg", image("a")) == ("tcg", "asked for")
    accelerator.keep(GOOD, image("a"))
    assert accelerator.settle("auto", image("a")) == ("kvm", GOOD.reason)
    accelerator.keep(BAD, image("a"))
    assert accelerator.settle("auto", image("a")) == ("tcg", BAD.reason)
    with pytest.raises(AcceleratorError, match="'kvm' was demanded and cannot be used: QEMU ended"):
        accelerator.settle("kvm", image("a"))
    monkeypatch.setattr(accelerator, "unavailable", lambda: "/dev/kvm does not exist")
    assert accelerator.settle("auto", image("new")) == ("tcg", "/dev/kvm does not exist")


def test_a_verdict_that_cannot_be_kept_is_said_and_costs_no_start(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.parent.touch()  # no folder
    accelerator.keep(GOOD, image("a"))
    assert f"it cannot be kept in {own_cache.parent}" in caplog.text
    assert accelerator.choice("auto", GOOD) == ("kvm", GOOD.reason)
