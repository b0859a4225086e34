"""One run of the lab: QEMU under software emulation, a command in it, its output as it comes, its results.

Time. Emulated, everything takes some twenty times longer than on hardware, and deadlines of product and tests
would pass. So the lab's clocks go `SLOWNESS` times slower than the host's (libfaketime, around QEMU): nothing
in product or tests has to know about the lab. QEMU's own way to that end, counting instructions (`-icount`),
does not do: under QEMU 7.2 the guests of the lab's KVM then hang, one boot in five, spinning for a lock that
their only CPU holds.

The exchange disk is a tar archive both ways; see guest/init.py.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.image import tool
from sandbox_kernel.image.store import Image

SLOWNESS = 5
"""Seconds of the host in a second of the lab. With eight or more the lab's time stamp counter, which is the
host's, would be too fast for Linux' delay loops (arch/x86/lib/delay.c: 32 bits of a product).
"""
CPUS = 1
"""With two, QEMU 7.2 at times runs code that Linux has just patched: an oops in the module kvm."""
MEMORY = 8192
"""MiB; the lab's files are in it, too."""
KERNEL_ARGUMENTS = (
    # What Linux' KVM finds remarkable in each guest's boot is an error to it, and none.
    *("console=ttyS0", "loglevel=3", "panic=-1", "reboot=t", "mitigations=off", "random.trust_bootloader=on"),
    # That check waits a number of ticks of the time stamp counter, which is too fast in here.
    "no_timer_check",
)
EXCHANGE = 256 << 20
"""Bytes of the exchange disk, of which the file takes what is written."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: the command's exit status.
        seconds: what it took, by the lab's clock.
    """

    status: int
    seconds: float


class LabError(Exception):
    """The lab itself did not work."""


def command_line(image: Image, guests: Path, exchange: Path) -> list[str]:
    """QEMU's argv; the serial console is its standard input and output."""
    drives = ((image.root, "on"), (guests, "on"), (exchange, "off"))
    tether = (str(tool.find("setpriv")), "--pdeathsig", "KILL", "--")
    argv = [
        # Whoever starts the lab and is killed takes it along; so does faketime, which waits for QEMU.
        *tether,
        *(_faketime(), "-f", f"+0 x{1 / SLOWNESS:g}"),
        *tether,
        str(tool.find("qemu-system-x86_64")),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "pc", "-accel", "tcg,tb-size=1024", "-cpu", "max"),
        *("-smp", str(CPUS), "-m", f"{MEMORY}M"),
        *("-kernel", str(image.vmlinux), "-initrd", str(image.initrd)),
        *("-append", " ".join(KERNEL_ARGUMENTS)),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-device", "virtio-rng-pci"),
    ]
    for number, (file, read_only) in enumerate(drives):
        argv += ["-drive", f"if=none,id=d{number},format=raw,readonly={read_only},file={file}"]
        argv += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return argv


def _faketime() -> str:
    found = shutil.which("faketime")
    if found is None:
        raise LabError("faketime is not installed; run `sudo apt-get install faketime`, then this again.")
    return found


def run(
    image: Image,
    guests: Path,
    command: list[str],
    results: Path,
    limit: float,
) -> Outcome:
    """Starts the lab, runs `command` in it as an ordinary user, in a copy of the checkout.

    Args:
        image: the lab's.
        guests: disk of guest images.
        command: the words; its output goes to our standard output.
        results: folder for what it leaves in the folder that `$RESULTS` names in there.
        limit: seconds, by the host's clock, after which a lab that hangs is ended.

    Raises:
        LabError: the lab did not come to the command, or not to its end.
    """
    results.mkdir(parents=True, exist_ok=True)
    exchange = results / "exchange"
    try:
        write_order(exchange, command)
        done = subprocess.run(command_line(image, guests, exchange), check=False, timeout=limit)
        return read_results(exchange, results, done.returncode)
    except subprocess.TimeoutExpired as error:
        raise LabError(f"The lab did not end within {limit / 60:g} minutes; allow it more.") from error
    finally:
        exchange.unlink(missing_ok=True)


def write_order(exchange: Path, command: list[str]) -> None:
    """Makes the exchange disk that goes into the lab."""
    content = json.dumps({"command": command}).encode()
    with tarfile.open(exchange, "w") as archive:
        entry = tarfile.TarInfo("order.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    with exchange.open("r+b") as stream:
        stream.truncate(EXCHANGE)


def read_results(exchange: Path, results: Path, qemu: int) -> Outcome:
    """Takes the results off the exchange disk that came out, into the folder `results`.

    Args:
        exchange: the disk.
        results: the folder.
        qemu: exit status of QEMU.

    Raises:
        LabError: the lab did not come to the command, or not to its end.
    """
    with tarfile.open(exchange) as archive:
        names = archive.getnames()
        if "status.json" not in names:
            raise LabError(f"The lab ended before its command did (QEMU's exit status {qemu}).")
        stream = archive.extractfile("status.json")
        assert stream is not None
        status = json.load(stream)
        if "failed" in status:
            raise LabError(f"The lab did not come up: {status['failed']}")
        members = [each for each in archive.getmembers() if each.name.startswith("results/") and each.isreg()]
        for member in members:
            member.name = member.name.removeprefix("results/")
            archive.extract(member, results, filter="data")
    return Outcome(int(status["status"]), float(status["seconds"]))
