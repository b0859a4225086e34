"""What was refused: one note each in a file, one sentence for each place in each cell."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.network.refusals import FILE, Refusals
from sandbox_kernel.policy import policy

MORE = "The network policy refused more; `sandbox-kernel logs --network` shows all of it."


class Told:
    """Refusals, and who is told of them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.cell = "cell-1"
        self.sentences: list[str] = []
        self.refusals = Refusals(folder)
        self.refusals.policy = policy("allowlist", (), ["8.8.8.8", "*.bad.org"])
        self.refusals.report_to(lambda: self.cell, self.sentences.append)

    def notes(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    made = Told(tmp_path)
    yield made
    made.refusals.close()


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("spoofed", "it did not come from the guest's own address"),
        ("gateway", "nothing of the host is to be reached there; name a port in `host_services`"),
        ("other-dns", "the only DNS server is the one in /etc/resolv.conf"),
        ("connections", "too many connections are open (`network_connections`)"),
        ("private", "the address is private, or special; name its network in `network_allow`"),
        ("unlisted", "no rule allows it; name it in `network_allow`"),
        ("dns-rate", "too many questions were asked of the DNS server"),
        ("name", "no rule allows this name; add it to `network_allow`"),
        ("denied-name", "`network_deny` has this name"),
        ("rebinding", "its answer points to a private address"),
        ("deny:0", "`network_deny` has 8.8.8.8"),
        ("deny:1", "`network_deny` has *.bad.org"),
        ("deny:2", "`network_deny` has a rule"),
        ("deny:", "`network_deny` has a rule"),
        ("deny:-1", "`network_deny` has a rule"),
        ("whatever", "no rule allows it"),
    ],
)
def test_a_refusal_has_its_reason_in_the_sentence_and_in_the_file(told: Told, why: str, reason: str) -> None:
    told.refusals.note(why, "93.0.0.1:443 (tcp)", "x.org")
    assert told.sentences == [f"The network policy (allowlist) refused 93.0.0.1:443 (tcp) [x.org]: {reason}."]
    [note] = told.notes()
    assert abs(time.time() - float(str(note.pop("time")))) < 60
    assert note == {
        "cell": "cell-1",
        "destination": "93.0.0.1:443 (tcp) [x.org]",
        "rule": why,
        "reason": reason,
    }


def test_a_place_has_one_sentence_in_each_cell_and_each_refusal_one_note(told: Told) -> None:
    for cell in ("cell-1", "cell-2"):
        told.cell = cell
        for _ in range(3):
            told.refusals.note("unlisted", "1.2.3.4:80 (tcp)")
            told.refusals.note("name", "x.org")
    assert len(told.sentences) == 4
    assert [note["cell"] for note in told.notes()] == ["cell-1"] * 6 + ["cell-2"] * 6


def test_sentences_of_one_cell_have_a_limit_and_the_next_cell_its_own(told: Told) -> None:
    for number in range(1000):
        told.refusals.note("unlisted", f"10.0.{number >> 8}.{number & 255} (icmp)")
    assert len(told.sentences) == 9
    assert told.sentences[-1] == MORE
    told.cell = "cell-2"
    told.refusals.note("unlisted", "1.1.1.1 (icmp)")
    assert len(told.sentences) == 10
    assert len(told.notes()) == 1001


def test_nobody_is_told_when_no_cell_runs(told: Told) -> None:
    told.cell = ""
    told.refusals.note("unlisted", "1.1.1.1 (icmp)")
    assert told.sentences == []
    assert [note["cell"] for note in told.notes()] == [""]


def test_a_name_of_any_kind_is_one_line_of_the_file(told: Told) -> None:
    told.refusals.note("name", 'a\n"\x1b[31m\u2028\udc80b', "%s\r\n")
    text = told.file.read_bytes()
    assert text.count(b"\n") == 1
    assert text.isascii() and b"\x1b" not in text


def test_before_somebody_is_told_all_is_in_the_file(tmp_path: Path) -> None:
    refusals = Refusals(tmp_path)
    refusals.note("unlisted", "1.1.1.1 (icmp)")
    refusals.close()
    assert json.loads((tmp_path / FILE).read_text())["destination"] == "1.1.1.1 (icmp)"
