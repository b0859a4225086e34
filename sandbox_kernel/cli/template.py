"""`sandbox-kernel template`: list, build and remove templates."""

from __future__ import annotations

import time

import click
from rich.console import Console

from sandbox_kernel.cli.progress import Steps
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.store import TemplateStore

_DEFAULT = VMSpec()


@click.group()
def template() -> None:
    """Templates, from which kernels start in no time: list, build, remove."""


@template.command("ls")
def list_templates() -> None:
    """List the templates, the last used first."""
    names = (
        "TEMPLATE",
        "IMAGE",
        "MEMORY",
        "VCPUS",
        "ACCELERATOR",
        "NETWORK",
        "PRELOADED",
        "SIZE",
        "LAST USED",
    )
    rows = [names]
    for found in TemplateStore().all():
        key = found.key
        rows.append(
            (
                found.digest[:12],
                str(key.get("image", ""))[:12],
                f"{key.get('memory')} MiB",
                str(key.get("vcpus")),
                str(key.get("accelerator")),
                "yes" if key.get("network") else "no",
                ",".join(map(str, key.get("modules", []))) or "-",
                f"{found.bytes / 1e6:.0f} MB",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(found.used)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@template.command("build")
@click.option("--image", default="default", show_default=True, help="Guest image, by name or digest.")
@click.option("--memory", default=_DEFAULT.memory, show_default=True, help="RAM in MiB.")
@click.option("--vcpus", default=_DEFAULT.vcpus, show_default=True, help="Virtual CPUs.")
@click.option("--accelerator", default="auto", show_default=True, help="auto, kvm or tcg.")
@click.option("--network", is_flag=True, help="For kernels with a network, whatever its policy.")
@click.option("--preload", multiple=True, help="Python module that is imported in it.")
def build_template(
    image: str, memory: int, vcpus: int, accelerator: str, network: bool, preload: tuple[str, ...]
) -> None:
    """Make a template, unless it is there."""
    from sandbox_kernel.host import template as work
    from sandbox_kernel.spec import resolve

    wanted = {
        "image": image,
        "memory": memory,
        "vcpus": vcpus,
        "accelerator": accelerator,
        "network": "allowlist" if network else "none",
        "preload": list(preload),
    }
    spec = resolve([("The command line", wanted)])
    made = work.ensure(spec, Steps(Console(stderr=True)))
    click.echo(f"template {made.digest[:12]}, {made.bytes / 1e6:.0f} MB in {made.directory}")


@template.command("rm")
@click.argument("templates", nargs=-1, required=True)
def remove_templates(templates: tuple[str, ...]) -> None:
    """Remove templates; kernels that run go on."""
    for name in templates:
        TemplateStore().remove(name)
        click.echo(f"removed {name}")
