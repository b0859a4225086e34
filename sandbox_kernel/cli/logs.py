"""`sandbox-kernel logs`: what a kernel's supervisor says, and what its network has refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from sandbox_kernel.network.refusals import FILE
from sandbox_kernel.supervisor.remote import ask, find


@click.command()
@click.argument("vm", default="")
@click.option("--network", is_flag=True, help="Show what the network has refused.")
def logs(vm: str, network: bool) -> None:
    """Show the log of VM, which is as `sandbox-kernel ps` shows it; of the only one when left out."""
    folder = Path(ask(find(vm), {"op": "logs"})["logs"])
    name = FILE if network else "supervisor.log"
    for path in (folder / f"{name}.1", folder / name):
        if not path.exists():
            continue
        for line in path.read_text(errors="replace").splitlines():
            click.echo(_refusal(line) if network else line)


def _refusal(line: str) -> str:
    """A line of the network's log, for people."""
    try:
        note = json.loads(line)
    except ValueError:  # its end is still to be written
        return line
    when = time.strftime("%H:%M:%S", time.localtime(note["time"]))
    cell = note["cell"] or "no cell"
    return f"{when}  {note['destination']}  {note['reason']}  [{note['rule']}; {cell}]"
