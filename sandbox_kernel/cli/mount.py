"""`sandbox-kernel mount`, `unmount` and `mounts`: directories of the host in a kernel that runs."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox_kernel.mount import fill_in
from sandbox_kernel.supervisor.remote import ask, find


@click.command()
@click.argument("vm")
@click.argument("mount")
def mount(vm: str, mount: str) -> None:
    """Mount a directory in VM, as in the key `mounts`: SOURCE:TARGET or SOURCE:TARGET:rw.

    VM is as `sandbox-kernel ps` shows it, or the beginning of that. {cwd} is the present directory.
    """
    [text] = fill_in((mount,), dict.fromkeys(("cwd", "notebook_dir"), str(Path.cwd())))
    ask(find(vm), {"op": "mount", "mount": text})


@click.command()
@click.argument("vm")
@click.argument("target")
def unmount(vm: str, target: str) -> None:
    """Take the mount on TARGET out of VM; who has files open there gets errors."""
    ask(find(vm), {"op": "unmount", "target": target})


@click.command()
@click.argument("vm")
def mounts(vm: str) -> None:
    """List what VM has mounted."""
    for each in ask(find(vm), {"op": "mounts"})["mounts"]:
        click.echo(each)
