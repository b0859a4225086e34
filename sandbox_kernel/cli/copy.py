"""`sandbox-kernel cp`: files and directories between this host and a kernel that runs."""

from __future__ import annotations

import click
from rich.console import Console

from sandbox_kernel.cli.progress import transfer
from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.supervisor.remote_copy import MAX_FILES, MAX_SIZE, pull, push

_MIB = 1 << 20


@click.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--max-size",
    type=click.IntRange(1),
    default=MAX_SIZE >> 20,
    show_default=True,
    help="MiB that a VM may send.",
)
@click.option(
    "--max-files",
    type=click.IntRange(1),
    default=MAX_FILES,
    show_default=True,
    help="Files and directories that a VM may send.",
)
@click.pass_context
def cp(context: click.Context, source: str, target: str, max_size: int, max_files: int) -> None:
    """Copy a file or directory out of a VM (cp VM:PATH LOCAL) or into it (cp LOCAL VM:PATH).

    VM is as `sandbox-kernel ps` shows it, or the beginning of that; without it, the only VM there is. A
    relative PATH is from the kernel's home. Where TARGET is a directory, the copy goes into it under its
    name; otherwise TARGET is its name. A source that ends in /. is what is in that directory. Links are not
    followed, and left out.
    """
    (from_vm, inside), (to_vm, into) = split(source), split(target)
    with transfer(Console(stderr=True), source) as watch:
        if from_vm is not None and to_vm is None:
            copied = pull(from_vm, inside, target, max_size * _MIB, max_files, watch)
        elif to_vm is not None and from_vm is None:
            copied = push(to_vm, source, into, watch)
        else:
            raise ConfigurationError(
                "One of the two is in a VM, written VM:PATH, and the other one on this host; write a local "
                "name that has a colon in it as ./NAME."
            )
    for each in copied.left_out:
        click.echo(f"left out: {each}", err=True)
    if copied.unlisted:
        click.echo(f"left out: {copied.unlisted} more", err=True)
    click.echo(f"{copied.files} {'file' if copied.files == 1 else 'files'}, {size(copied.size)}", err=True)
    if copied.failed:
        context.exit(1)


def split(text: str) -> tuple[str | None, str]:
    """The VM that an argument names, None for this host, and the path."""
    vm, colon, path = text.partition(":")
    return (vm, path) if colon and "/" not in vm else (None, text)


def size(count: int) -> str:
    """Bytes as people read them."""
    amount, units = float(count), ["kB", "MB", "GB", "TB"]
    if count < 1000:
        return f"{count} bytes" if count != 1 else "1 byte"
    unit = ""
    while amount >= 1000 and units:
        amount, unit = amount / 1000, units.pop(0)
    return f"{amount:.1f} {unit}"
