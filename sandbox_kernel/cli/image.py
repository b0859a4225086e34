"""`sandbox-kernel image`: build, list, show and remove guest images."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from sandbox_kernel.cli.progress import Steps
from sandbox_kernel.host import template
from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.recipe import read_requirements, requirement
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.spec import resolve
from sandbox_kernel.template.store import TemplateStore


@click.group()
def image() -> None:
    """Guest images: build, list, show, remove."""


@image.command("build")
@click.option("--name", default="default", show_default=True, help="What the image will be called.")
@click.option(
    "--requirements",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="File with Python requirements to add.",
)
@click.option("--package", "packages", multiple=True, help="Python requirement to add: scipy==1.15.3.")
@click.option("--preload", multiple=True, help="Python module that is imported before a kernel is needed.")
@click.option("--mirror", help="Debian mirror to fetch from [default: the host's own].")
@click.option("--force", is_flag=True, help="Build even if nothing has changed, to get newer versions.")
def build_image(
    name: str,
    requirements: tuple[Path, ...],
    packages: tuple[str, ...],
    preload: tuple[str, ...],
    mirror: str | None,
    force: bool,
) -> None:
    """Build an image, unless it is there and its inputs have not changed."""
    extra = [requirement(package) for package in packages]
    for file in requirements:
        extra += read_requirements(file)
    modules = resolve([("The command line", {"preload": list(preload)})]).preload
    recipe = default_recipe().with_packages(tuple(extra)).with_preload(modules)
    order = Order(recipe, name, mirror, force)
    steps = Steps(Console(stderr=True))
    result, built = build(order, ImageStore(), steps)
    template.offer(name, steps)
    steps.summary()
    said = "built" if built else "is up to date"
    click.echo(f"image {name} {said}: {result.digest[:12]}, {_megabytes(result)} in {result.directory}")


@image.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_images(as_json: bool) -> None:
    """List the images."""
    images = ImageStore().list()
    if as_json:
        click.echo(json.dumps([_summary(found) for found in images], indent=1))
        return
    rows = [("NAME", "DIGEST", "CREATED", "PYTHON", "KERNEL", "SIZE")]
    for found in images:
        manifest = found.manifest
        rows.append(
            (
                *(found.name or "-", found.digest[:12], manifest.created, manifest.python),
                *(manifest.kernel, _megabytes(found)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@image.command("show")
@click.argument("name", default="default")
def show_image(name: str) -> None:
    """Print an image's manifest, after checking its files against it."""
    click.echo(ImageStore().open(name).manifest.to_json(), nl=False)


@image.command("rm")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--unnamed", is_flag=True, help="Remove every image that has no name (any more).")
def remove_images(names: tuple[str, ...], unnamed: bool) -> None:
    """Take names (or digests) away; an image without a name is deleted."""
    store = ImageStore()
    chosen = list(names)
    if unnamed:
        chosen += [found.digest for found in store.list() if not found.name]
    if not chosen and not unnamed:
        raise click.UsageError("Name an image, or give --unnamed.")
    for name in chosen:
        digest = store.remove(name)
        click.echo(f"removed {name} ({digest[:12]})")
        if digest not in [found.digest for found in store.list()]:
            for gone in TemplateStore().forget(digest):
                click.echo(f"removed template {gone[:12]}")


def _megabytes(found: Image) -> str:
    return f"{found.manifest.size() / 1e6:.0f} MB"


def _summary(found: Image) -> dict[str, object]:
    manifest = found.manifest
    return {
        "name": found.name or None,
        "digest": found.digest,
        "created": manifest.created,
        "python": manifest.python,
        "kernel": manifest.kernel,
        "size": manifest.size(),
        "directory": str(found.directory),
    }
