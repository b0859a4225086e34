"""The host's clock jumps: limits of time go by a clock that does not, and nothing else takes notice.

This machine's clock is left alone. libfaketime tells client and supervisor another time of day, which a file
sets, and leaves them the monotonic clock, as somebody does who sets a real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.microvm import READY

SLEEP = """
# time.sleep waits for a time of the monotonic clock, libfaketime 0.9.10 thinks of the other one.
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds)
"""

CLIENT = """
import json, time
from datetime import datetime
from pathlib import Path
from tests.microvm import READY, manager, microvm, traces, until

def jump(hours):
    Path(clock).write_text(f"{hours:+d}h")

def told(kernel, code):
    "Kinds of a cell's messages, and hours that the supervisor's clock is ahead of the guest's."
    cell = kernel.client.execute(code)
    if "while" not in code:
        time.sleep(0.5)
        jump(hours)
    messages = kernel.iopub_until_idle(cell)
    notices = [m for m in messages if "[sandbox-kernel]" in m["content"].get("text", "")]
    ahead = [(m["header"]["date"] - messages[0]["header"]["date"]).total_seconds() / 3600 for m in notices]
    kinds = [m["content"].get("ename") or m["msg_type"] for m in messages[2:-1]]
    return kinds, [round(each) for each in ahead]

with microvm(cell_timeout=3, cell_grace=3, idle_timeout=8, lifetime=3600) as kernel:
    for hours in (30, -30):
        seen = told(kernel, "import time; time.sleep(1.5); 'through'")
        began = time.monotonic()
        late = told(kernel, "while True: pass")
        seconds = time.monotonic() - began
        print(json.dumps([seen, late, 2.5 < seconds < 6, kernel.manager.is_alive()]))
    began = time.monotonic()
    jump(30)
    ended = until(lambda: not kernel.manager.is_alive(), READY)
    print(json.dumps([ended, kernel.manager.provisioner.handle.death.name, time.monotonic() - began > 6]))
    vm = kernel.manager.provisioner._vm_id()
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=READY)
    guest = float(kernel.run("import time; print(time.time())").split()[-1])
    print(json.dumps([kernel.manager.provisioner.report["start"], abs(guest - time.time()) < 1]))
print(json.dumps(traces(vm)))
"""


@pytest.fixture
def libfaketime() -> Path:
    for found in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"):
        return found
    pytest.skip("libfaketime is not installed; install it with `sudo apt-get install faketime`")


def test_a_clock_that_jumps_by_hours_ends_no_kernel_stops_no_limit_and_breaks_no_clean_up(
    installed: None, libfaketime: Path, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    (tmp_path / "sitecustomize.py").write_text(SLEEP)
    faked = {
        "LD_PRELOAD": str(libfaketime),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"clock = {str(clock)!r}\n{CLIENT}"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=READY,
        env=os.environ | faked,
    )
    forward, backward, idle, again, left = map(json.loads, done.stdout.splitlines())
    through = [["execute_result"], []]
    interrupted = ["stream", "KeyboardInterrupt"]
    assert forward == [through, [interrupted, [30]], True, True]
    assert backward == [through, [interrupted, [-30]], True, True]
    assert idle == [True, "IdleTimeLimitExceeded", True]
    assert again == ["restored", True]
    assert left == []
