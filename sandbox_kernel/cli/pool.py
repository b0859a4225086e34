"""`sandbox-kernel pool`: the service that keeps VMs waiting, and what it has."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
from pathlib import Path

import click

import sandbox_kernel.pool

UNIT = Path(sandbox_kernel.pool.__file__).with_name("sandbox-kernel-pool.service")


@click.group(invoke_without_command=True)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="KERNELSPEC=N",
    help="Keep N VMs waiting for this kernelspec; may be given again.",
)
@click.option("--memory", type=int, help="MiB that all waiting VMs together may have.")
@click.option("--max-age", type=int, help="Seconds after which a waiting VM is replaced.")
@click.option("--config", type=click.Path(path_type=Path), help="File instead of the user's pool.toml.")
@click.pass_context
def pool(
    context: click.Context,
    sizes: tuple[str, ...],
    memory: int | None,
    max_age: int | None,
    config: Path | None,
) -> None:
    """Keep VMs restored and waiting, so that kernels start at once; runs until it is ended.

    What to keep stands in pool.toml in the user's configuration folder, and may be overridden here:

    \b
        memory = 2048
        max_age = 3600
        [kernels]
        python3-microvm = 1
    """
    if context.invoked_subcommand is not None:
        return
    from sandbox_kernel.host.kernelspec import spec_of
    from sandbox_kernel.pool.config import load, override
    from sandbox_kernel.pool.service import Service

    wanted = override(load(config), dict(map(_size, sizes)), memory, max_age)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    service = Service(wanted, {name: spec_of(name) for name in wanted.kernels})
    asyncio.run(service.run())


@pool.command("status")
def status() -> None:
    """Show what the pool has."""
    from sandbox_kernel.pool.client import status as ask

    told = ask()
    sizes = ", ".join(f"{count} × {name}" for name, count in told["sizes"].items())
    click.echo(f"process {told['pid']}; wanted: {sizes or 'none'}; given: {told['given']}")
    if told["why_not"]:
        click.echo(f"fewer wait than wanted: {told['why_not']}")
    rows = [("VM", "KERNELSPEC", "STATE", "AGE", "MEMORY", "SUPERVISOR")]
    for vm in told["vms"]:
        state = "ready" if vm["ready"] else "being prepared"
        rows.append(
            (vm["id"], vm["kind"], state, f"{vm['age']:.0f} s", f"{vm['memory']:.0f} MiB", str(vm["pid"]))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@pool.command("unit")
def unit() -> None:
    """Print the systemd user unit, with the place of this command filled in."""
    command = shutil.which("sandbox-kernel") or sys.argv[0]
    click.echo(UNIT.read_text().replace("=sandbox-kernel pool", f"={command} pool"), nl=False)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal():
        raise click.UsageError(f"--size is KERNELSPEC=N, for instance python3-microvm=2, not {text!r}.")
    return name, int(number)
