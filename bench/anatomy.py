"""Where the memory of an idle kernel is, part by part.

Some kernels are started, as other benches start them, each runs the cell `1+1`, and when they have been idle
for a while the processes of each are taken apart (bench.parts); that whose total is the median is shown.
Several are alive at once, because only then do a template's pages that are only read belong to no single one.

`python -m bench.anatomy`; the first kernel is the yardstick. The supervisors are forked from a zygote, as
those of every client that starts more than one kernel are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from bench import machine, memory, pool
from bench.crowd import Crowd, surroundings
from bench.kernel import KernelTrouble, variant
from bench.parts import Anatomy, Process, dissect, middle, parse_page_tables
from sandbox_kernel.errors import SandboxKernelError
from sandbox_kernel.supervisor.nursery import nursery

KERNELS = ("python3", "python3-microvm")
_ZYGOTE = 1.0
"""Seconds that a zygote may take to come up."""


@click.command()
@click.option("--kernel", "names", multiple=True, help="As of `python -m bench`; the first is the yardstick.")
@click.option("--count", type=click.IntRange(1), default=5, show_default=True, help="Live kernels of each.")
@click.option(
    "--idle", type=click.FloatRange(0), default=10.0, show_default=True, help="Seconds from the last cell on."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here.")
def main(names: tuple[str, ...], count: int, idle: float, json_file: Path | None) -> None:
    """Measures where the memory of an idle kernel is."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    found: dict[str, list[Anatomy]] = {}
    accelerator = ""
    troubles = []
    for name in names or KERNELS:
        try:
            found[name], told = take_apart(name, count, idle)
            accelerator = told or accelerator
        except (KernelTrouble, pool.PoolTrouble, SandboxKernelError, RuntimeError, OSError) as error:
            troubles.append(f"{name}: {error}")
    shown = {name: middle(anatomies) for name, anatomies in found.items()}
    where = machine.look(accelerator)
    if shown:
        console.print(table(shown, count))
    console.print(where.line(), highlight=False, soft_wrap=True)
    if json_file is not None:
        document = {
            "machine": asdict(where),
            "count": count,
            "kernels": {name: _document(shown[name], each) for name, each in found.items()},
            "troubles": troubles,
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    for trouble in troubles:
        click.echo(trouble, err=True)
    sys.exit(1 if troubles else 0)


def take_apart(name: str, count: int, idle: float) -> tuple[list[Anatomy], str]:
    """Starts `count` kernels, has each run a cell, and takes them apart when they have been idle.

    Args:
        name: see `bench.kernel.variant`.
        count: kernels that are alive at the same time.
        idle: seconds between the last cell and the look.

    Returns:
        Each kernel's memory, and the accelerator of their VMs; empty where they have none.

    Raises:
        KernelTrouble: one did not start as it was to, or has ended.
    """
    _, way = variant(name)
    with ExitStack() as stack:
        stack.enter_context(surroundings(name, count))
        if way == "restored":
            stack.callback(nursery.close)
            nursery.warm()
            time.sleep(_ZYGOTE)
        crowd = Crowd(name)
        stack.callback(crowd.end)
        for _ in range(count):
            crowd.add()
        time.sleep(idle)
        return [dissect(_processes(root)) for root in crowd.roots], crowd.accelerator


def table(shown: Mapping[str, Anatomy], count: int) -> Table:
    """The parts of one kernel of each name, one beside the other."""
    made = Table(caption=f"MiB of one idle kernel of {count} that have run 1+1", caption_justify="left")
    made.add_column("")
    for name in shown:
        made.add_column(name, justify="right")
    anatomies = list(shown.values())
    for part in dict.fromkeys(part for each in anatomies for part in each.parts):
        made.add_row(part, *(_mib(each.parts.get(part)) for each in anatomies))
    made.add_section()
    made.add_row("unique memory", *(_mib(each.total) for each in anatomies))
    made.add_row("of the first", *(f"{each.total / anatomies[0].total:.2f}" for each in anatomies))
    made.add_row("page tables (of the host's kernel)", *(_mib(each.page_tables) for each in anatomies))
    return made


def _processes(root: int) -> list[Process]:
    """The processes of a kernel, the one that its provisioner names first.

    Raises:
        KernelTrouble: it has ended.
    """
    try:
        return [_look(each) for each in memory.group(root)]
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError) as error:
        raise KernelTrouble("A kernel ended while it was to be idle.") from error


def _look(process: psutil.Process) -> Process:
    folder = Path(f"/proc/{process.pid}")
    mappings = memory.parse_smaps((folder / "smaps").read_text())
    return Process(process.name(), tuple(mappings), parse_page_tables((folder / "status").read_text()))


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _document(shown: Anatomy, all_of_them: list[Anatomy]) -> dict[str, object]:
    totals = [each.total for each in all_of_them]
    return {"parts": shown.parts, "page_tables": shown.page_tables, "total": shown.total, "totals": totals}


if __name__ == "__main__":
    main()
