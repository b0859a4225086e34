"""The lab's disks and what goes in and out of it, without starting it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.lab import machine, suites
from tests.lab.machine import LabError


def answer(exchange: Path, files: dict[str, bytes]) -> None:
    """What the lab writes over the exchange disk."""
    with tarfile.open(exchange, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_an_order_is_the_first_thing_on_the_exchange_disk(tmp_path: Path) -> None:
    exchange = tmp_path / "exchange"
    machine.write_order(exchange, ["echo", "a b"])
    with tarfile.open(exchange) as archive:
        [name] = archive.getnames()
        order = archive.extractfile(name)
        assert order is not None
        assert json.load(order) == {"command": ["echo", "a b"]}
    assert exchange.stat().st_size == machine.EXCHANGE


def test_results_come_out_beside_each_other_and_with_the_status(tmp_path: Path) -> None:
    exchange = tmp_path / "exchange"
    status = json.dumps({"status": 3, "seconds": 1.5}).encode()
    answer(exchange, {"status.json": status, "results/junit.xml": b"<x/>", "results/a/b.json": b"{}"})
    outcome = machine.read_results(exchange, tmp_path, qemu=0)
    assert (outcome.status, outcome.seconds) == (3, 1.5)
    assert (tmp_path / "junit.xml").read_bytes() == b"<x/>"
    assert (tmp_path / "a" / "b.json").read_bytes() == b"{}"


def test_a_result_that_points_elsewhere_is_not_taken(tmp_path: Path) -> None:
    exchange, folder = tmp_path / "exchange", tmp_path / "results"
    folder.mkdir()
    status = json.dumps({"status": 0, "seconds": 1}).encode()
    answer(exchange, {"status.json": status, "results/../../outside": b"x"})
    with pytest.raises(tarfile.OutsideDestinationError):
        machine.read_results(exchange, folder, qemu=0)
    assert not (tmp_path / "outside").exists()


def test_a_lab_that_ended_early_says_so(tmp_path: Path) -> None:
    exchange = tmp_path / "exchange"
    machine.write_order(exchange, ["true"])
    with pytest.raises(LabError, match="before its command"):
        machine.read_results(exchange, tmp_path, qemu=1)


def test_a_lab_that_did_not_come_up_says_why(tmp_path: Path) -> None:
    exchange = tmp_path / "exchange"
    answer(exchange, {"status.json": json.dumps({"failed": "no such device"}).encode()})
    with pytest.raises(LabError, match="no such device"):
        machine.read_results(exchange, tmp_path, qemu=0)


def test_every_file_of_a_suite_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    for name, suite in suites.SUITES.items():
        for word in suite.command.split():
            if word.startswith("tests/"):
                assert (root / word).exists(), f"{name}: {word}"
