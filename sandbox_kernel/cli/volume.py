"""`sandbox-kernel volume`: make, list and remove volumes."""

from __future__ import annotations

import click

from sandbox_kernel.files.volumes import LARGEST, SMALLEST, Stored, VolumeStore
from sandbox_kernel.supervisor.overview import look_at_all

_MIB = 1 << 20


@click.group()
def volume() -> None:
    """Volumes, which keep a kernel's files beyond its end: make, list, remove."""


@volume.command("create")
@click.argument("name")
@click.option(
    "--size",
    type=int,
    required=True,
    metavar="MIB",
    help=f"Most that it can hold, {SMALLEST} to {LARGEST}; it takes room on the host as it fills.",
)
def create_volume(name: str, size: int) -> None:
    """Make an empty volume, to be named in the key `volumes`: NAME:/path or NAME:/path:rw."""
    VolumeStore().create(name, size)
    click.echo(f"created {name}, {size} MiB")


@volume.command("ls")
def list_volumes() -> None:
    """List the volumes: what they can hold, what they take on the host, whose they are now."""
    found = VolumeStore().all()
    vms = {}
    if any(each.holders for each in found):
        vms = {vm["supervisor"]: vm["id"] for vm in look_at_all() if "supervisor" in vm}
    rows = [("VOLUME", "SIZE", "ON HOST", "ATTACHED")]
    for each in found:
        rows.append(
            (each.name, f"{each.size / _MIB:.0f} MiB", f"{each.used / _MIB:.1f} MiB", _attached(each, vms))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@volume.command("rm")
@click.argument("names", nargs=-1, required=True)
def remove_volumes(names: tuple[str, ...]) -> None:
    """Remove volumes and all that is in them; one that is attached stays."""
    for name in names:
        VolumeStore().remove(name)
        click.echo(f"removed {name}")


def _attached(found: Stored, vms: dict[int, str]) -> str:
    """Who has it: VMs by name, or by their supervisor where they have none yet."""
    who = (
        f"{vms.get(holder.pid, f'supervisor {holder.pid}')} ({'rw' if holder.writable else 'ro'})"
        for holder in found.holders
    )
    return ", ".join(who) or ("yes" if found.attached else "-")
