"""`sandbox-kernel setup`."""

from __future__ import annotations

import click
from rich.console import Console

from sandbox_kernel.cli.kernelspec import place_options
from sandbox_kernel.cli.progress import Steps


@click.command()
@click.option("--mirror", help="Debian mirror to fetch the guest from [default: the host's own].")
@place_options
def setup(mirror: str | None, prefix: str | None) -> None:
    """Get everything that is missing: programs, guest image, accelerator's verdict, kernelspec."""
    from sandbox_kernel.host import setup as work

    steps = Steps(Console(stderr=True))
    outcome = work.run(steps, mirror, prefix)
    steps.summary()
    size = outcome.image.manifest.size() / 1e6
    click.echo(f"image        default, {outcome.image.digest[:12]}, {size:.0f} MB")
    click.echo(f"accelerator  {outcome.accelerator} ({outcome.reason})")
    click.echo(f"kernelspec   {outcome.kernelspec}")
