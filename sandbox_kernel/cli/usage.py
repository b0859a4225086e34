"""`sandbox-kernel ps` and `sandbox-kernel stats`: which VMs run, and what they use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sandbox_kernel.supervisor.overview import look_at_all

_WIDTH = 160
"""Columns of a table where no terminal has its own."""
_MIB = 1 << 20
_SAMPLE = 1.0

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

_PS: Sequence[Column] = (
    ("VM", lambda vm: vm["id"]),
    ("KERNEL", lambda vm: vm["kernel"]),
    ("STATE", lambda vm: vm["state"]),
    ("START", lambda vm: vm["start"]),
    ("UPTIME", lambda vm: f"{vm['uptime']:.0f} s"),
    ("CELLS", lambda vm: str(vm["cells"])),
    ("CLIENT", lambda vm: str(vm["client"])),
    ("SUPERVISOR", lambda vm: str(vm["supervisor"])),
    ("EXPOSED", lambda vm: "\n".join(f"{each['port']} at {each['address']}" for each in vm["exposed"])),
)
_STATS: Sequence[Column] = (
    ("VM", lambda vm: vm["id"]),
    ("STATE", lambda vm: vm["state"]),
    ("CPU", lambda vm: f"{vm['cpu_percent']:.0f} %"),
    ("CPU TIME", lambda vm: f"{vm['cpu']:.1f} s"),
    ("HOST MEMORY", lambda vm: f"{vm['memory'] / _MIB:.0f} MiB"),
    ("GUEST MEMORY", lambda vm: _of(vm, "memory_current", "memory_max")),
    ("PEAK", lambda vm: _of(vm, "memory_peak")),
    ("DISK", lambda vm: _of(vm, "disk_used", "disk_size")),
    ("READ", lambda vm: _disk(vm, "read")),
    ("WRITTEN", lambda vm: _disk(vm, "written")),
    ("RECEIVED", lambda vm: _network(vm, "received")),
    ("SENT", lambda vm: _network(vm, "sent")),
    ("PROCESSES", lambda vm: str(vm["guest"]["pids_current"]) if vm["guest"] else "?"),
    ("CELLS", lambda vm: str(vm["cells"])),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ps(as_json: bool) -> None:
    """List the VMs of this user that have a kernel."""
    _print(look_at_all(), _PS, as_json)


@click.command()
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line each time.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=_SAMPLE,
    show_default=True,
    help="Seconds between two looks.",
)
def stats(watch: bool, as_json: bool, interval: float) -> None:
    """Show what the VMs of this user use: of the host, and as their guests see it."""
    before, at = look_at_all(), time.monotonic()

    def look() -> list[Row]:
        nonlocal before, at
        time.sleep(max(0.0, at + interval - time.monotonic()))
        now, found = time.monotonic(), look_at_all()
        rows = with_load(before, found, now - at)
        before, at = found, now
        return rows

    if not watch:
        _print(look(), _STATS, as_json)
        return
    try:
        if as_json:
            while True:
                click.echo(json.dumps(look()))
        with Live(console=_console(), auto_refresh=False) as live:
            while True:
                live.update(_table(look(), _STATS), refresh=True)
    except KeyboardInterrupt:
        pass


def with_load(before: Sequence[Row], now: Sequence[Row], seconds: float) -> list[Row]:
    """The rows of `now`, each with what it took of one CPU in per cent in the `seconds` since `before`."""
    earlier = {vm["id"]: vm.get("cpu", 0.0) for vm in before}
    return [
        vm
        if "error" in vm
        else {**vm, "cpu_percent": max(0.0, vm["cpu"] - earlier.get(vm["id"], vm["cpu"])) / seconds * 100}
        for vm in now
    ]


def _print(vms: Sequence[Row], columns: Sequence[Column], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(vms, indent=1))
    else:
        _console().print(_table(vms, columns))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _table(vms: Sequence[Row], columns: Sequence[Column]) -> Table:
    rows = [[name for name, _ in columns]]
    for vm in vms:
        unknown = [vm["id"], "does not answer", *[""] * (len(columns) - 2)]
        rows.append(unknown if "error" in vm else [show(vm) for _, show in columns])
    table = Table(box=None, pad_edge=False)
    for cells in zip(*rows, strict=True):
        # A terminal that is too narrow cuts columns off at the right instead of all of them.
        table.add_column(
            cells[0], no_wrap=True, min_width=max(len(line) for cell in cells for line in cell.split("\n"))
        )
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _of(vm: Row, name: str, limit: str = "") -> str:
    """A figure of the guest's, in MiB; ? where it does not answer."""
    if not vm["guest"]:
        return "?"
    figure = f"{vm['guest'][name] / _MIB:.0f}"
    return f"{figure} of {vm['guest'][limit] / _MIB:.0f} MiB" if limit else f"{figure} MiB"


def _disk(vm: Row, name: str) -> str:
    return f"{vm['disk'][name] / _MIB:.1f} MiB" if vm["disk"] else "?"


def _network(vm: Row, name: str) -> str:
    return f"{vm['network'][name] / _MIB:.1f} MiB" if vm["network"] else "none"
