"""`sandbox-kernel kernelspec`: makes the kernel known to Jupyter."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from sandbox_kernel.image.store import ImageStore


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --user, --sys-prefix and --prefix, and hands the command the one `prefix` that they mean."""

    @click.option(
        "--user", is_flag=True, help="Into the user's data folder [default outside of an environment]."
    )
    @click.option("--sys-prefix", is_flag=True, help="Into this environment [default inside of one].")
    @click.option("--prefix", metavar="FOLDER", help="Below FOLDER/share/jupyter/kernels.")
    @functools.wraps(command)
    def chosen(*, user: bool, sys_prefix: bool, prefix: str | None, **others: Any) -> None:
        from sandbox_kernel.host.kernelspec import default_prefix

        if sum((user, sys_prefix, prefix is not None)) > 1:
            raise click.UsageError("--user, --sys-prefix and --prefix exclude each other.")
        if sys_prefix:
            prefix = sys.prefix
        elif not user and prefix is None:
            prefix = default_prefix()
        command(prefix=prefix, **others)

    return chosen


@click.group()
def kernelspec() -> None:
    """Kernelspecs: what Jupyter shows to pick from."""


@kernelspec.command("install")
@click.option("--name", help="The kernelspec's name [default: python3-microvm, or python3-microvm-here].")
@click.option("--image", "image_name", help="Guest image for its kernels [default: the default image].")
@click.option("--display-name", help="What frontends show.")
@click.option("--here", is_flag=True, help="Its kernels have the notebook's directory, read-write.")
@place_options
def install(
    name: str | None, image_name: str | None, display_name: str | None, here: bool, prefix: str | None
) -> None:
    """Install the kernelspec for this environment's interpreter."""
    from sandbox_kernel.host.kernelspec import DEFAULT, HERE, Installation
    from sandbox_kernel.host.kernelspec import install as put

    if image_name is not None:
        ImageStore().open(image_name)
    like = HERE if here else DEFAULT
    name = name or like
    folder, written = put(Installation(name, prefix, image_name, display_name, like))
    click.echo(f"kernelspec {name} {'installed' if written else 'is up to date'}: {folder}")
