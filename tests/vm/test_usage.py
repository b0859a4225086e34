"""What a VM uses, as people and programs see it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect

from tests.microvm import READY, Kernel, microvm

COMMAND = str(Path(sys.executable).with_name("sandbox-kernel"))


def told(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [COMMAND, *arguments, "--json"], capture_output=True, text=True, timeout=READY, check=True
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def row_of(kernel: Kernel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    [row] = [row for row in rows if row["supervisor"] == kernel.supervisor.pid]
    return row


def test_a_kernel_is_listed_from_its_start_to_its_end(installed: None) -> None:
    with microvm() as kernel:
        kernel.run("1")
        kernel.run("2")
        row = row_of(kernel, told("ps"))
        assert (row["kernel"], row["state"], row["cells"]) == ("python3-microvm", "idle", 2)
        assert row["start"] in ("cold", "restored")
        cell = kernel.client.execute("import time; time.sleep(4)")
        time.sleep(1)
        assert row_of(kernel, told("ps"))["state"] == "busy"
        kernel.reply_to(cell)
        vm = row["id"]
    assert vm not in [row["id"] for row in told("ps")]


def test_figures_come_from_the_host_and_from_the_guest(installed: None) -> None:
    with microvm(memory=512, disk=200, processes=300) as kernel:
        before = kernel.manager.provisioner.handle.usage()
        kernel.run("hog = bytearray(100 << 20)\nfor i in range(0, len(hog), 4096): hog[i] = 1")
        kernel.run("import os\nf = open('x', 'wb')\nf.write(bytes(20 << 20))\nos.fsync(f.fileno())")
        kernel.run("import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass")
        after = row_of(kernel, told("stats"))
        mib = 1 << 20
        assert after["cpu"] - before["cpu"] > 1
        assert after["memory"] - before["memory"] > 90 * mib
        assert after["memory_peak"] >= after["memory"] - 16 * mib
        assert after["disk"]["written"] - before["disk"]["written"] >= 20 * mib
        guest, earlier = after["guest"], before["guest"]
        assert guest["memory_current"] - earlier["memory_current"] > 90 * mib
        assert guest["memory_peak"] >= guest["memory_current"]
        assert 300 * mib < guest["memory_max"] < 512 * mib
        assert guest["cpu"] - earlier["cpu"] > 1
        assert guest["disk_used"] - earlier["disk_used"] >= 19 * mib
        assert 150 * mib < guest["disk_size"] <= 200 * mib
        assert 0 < guest["pids_current"] < 300
        assert (after["limits"]["memory"], after["limits"]["processes"]) == (512, 300)
        assert after["network"] is None


def test_stats_goes_on_until_it_is_interrupted(installed: None) -> None:
    with microvm() as kernel:
        child = pexpect.spawn(COMMAND, ["stats", "--watch", "--interval", "0.3"], dimensions=(40, 160))
        for _ in range(2):
            child.expect(kernel.manager.provisioner.report["id"], timeout=READY)
        child.sendintr()
        child.expect(pexpect.EOF, timeout=10)
        child.close()
        assert child.exitstatus == 0


def test_a_guest_that_does_not_answer_costs_its_figures_and_no_more(installed: None) -> None:
    with microvm() as kernel:
        kernel.qemu.suspend()
        try:
            row = row_of(kernel, told("ps"))
            assert row["guest"] is None
            assert row["memory"] > 0
        finally:
            kernel.qemu.resume()
        assert kernel.run("1 + 1") == "2"
