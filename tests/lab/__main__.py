"""`python -m tests.lab`: builds the lab where needed, runs a suite in it, exits with its status."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.console import Console

from sandbox_kernel.cli.progress import Steps
from sandbox_kernel.errors import SandboxKernelError
from sandbox_kernel.image.store import ImageStore
from tests.lab import guests, image, machine, suites
from tests.lab.machine import LabError

DEBIANS = ("trixie", "bookworm")


@click.command()
@click.option("--suite", type=click.Choice(list(suites.SUITES)), default="standard", show_default=True)
@click.option("--debian", type=click.Choice(DEBIANS), default="trixie", show_default=True, help="The lab's.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(".cache/lab"),
    show_default=True,
    help="Results.",
)
@click.option(
    "--minutes", type=float, default=180, show_default=True, help="Until a lab that hangs is ended."
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def main(suite: str, debian: str, output: Path, minutes: float, words: tuple[str, ...]) -> None:
    """Runs a suite in the lab, or WORDS, a command of yours, after `sandbox-kernel setup`."""
    progress = Steps(Console(stderr=True))
    chosen = suites.Suite("a command", " ".join(words)) if words else suites.SUITES[suite]
    began = time.monotonic()
    try:
        store = ImageStore(image.cache() / "images")
        disk = guests.ensure(guests.images(chosen.guests, store, progress), image.cache())
        lab = image.ensure(debian, store, progress)
        ended = machine.run(lab, disk, suites.command(chosen), output, minutes * 60)
    except (LabError, SandboxKernelError) as error:
        raise click.ClickException(str(error)) from error
    took = (time.monotonic() - began) / 60
    click.echo(
        f"The lab's command ended with status {ended.status}: {ended.seconds / 60:.1f} minutes by the lab's "
        f"clock, {took:.1f} by this machine's; results are in {output}.",
        err=True,
    )
    sys.exit(ended.status)


if __name__ == "__main__":
    main()
