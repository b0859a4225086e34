"""`sandbox-kernel doctor`: what is required, what was found, what to do."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from sandbox_kernel.cli.progress import Steps
from sandbox_kernel.image.store import ImageStore

if TYPE_CHECKING:
    from sandbox_kernel.host.finding import Finding


_WIDTH = 160
"""Columns of the table where no terminal has its own."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--probe", is_flag=True, help="Try KVM again by booting the guest's kernel.")
@click.pass_context
def doctor(context: click.Context, as_json: bool, probe: bool) -> None:
    """Print every requirement, what was found and the fix; exit 1 when something needed is missing."""
    from sandbox_kernel.host import requirements
    from sandbox_kernel.host import setup as work

    if probe:
        work.probe(ImageStore().open(), Steps(Console(stderr=True)))
    findings = requirements.check_everything()
    healthy = not any(found.fatal for found in findings)
    if as_json:
        click.echo(json.dumps({"ok": healthy, "requirements": [_row(found) for found in findings]}, indent=1))
    else:
        _show(findings)
    context.exit(0 if healthy else 1)


def _row(found: Finding) -> dict[str, object]:
    return {**dataclasses.asdict(found), "status": _status(found)}


def _status(found: Finding) -> str:
    return "ok" if found.ok else "MISSING" if found.needed else "without"


def _show(findings: list[Finding]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("REQUIREMENT", max_width=48)
    table.add_column("FOUND", overflow="fold")
    table.add_column("FIX", overflow="fold")
    colours = {"ok": "green", "MISSING": "bold red", "without": "yellow"}
    for found in findings:
        status = _status(found)
        table.add_row(
            f"[{colours[status]}]{status}[/]",
            *(_plain(text) for text in (found.name, found.found, found.fix if not found.ok else "")),
        )
    console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
