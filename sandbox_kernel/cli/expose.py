"""`sandbox-kernel expose` and `unexpose`: ports of a kernel that runs, on the host's loopback."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox_kernel.exposure import fill_in
from sandbox_kernel.supervisor.remote import ask, find


@click.command()
@click.argument("vm")
@click.argument("port")
def expose(vm: str, port: str) -> None:
    """Expose a port of VM, as in the key `expose`, and print its address on this host.

    PORT is GUEST, GUEST:PORT or GUEST:/SOCKET. VM is as `sandbox-kernel ps` shows it, or the beginning of
    that. {cwd} is the present directory.
    """
    click.echo(ask(find(vm), {"op": "expose", "port": _filled(port)})["address"])


@click.command()
@click.argument("vm")
@click.argument("port")
def unexpose(vm: str, port: str) -> None:
    """Take an exposed PORT of VM away; who uses it is cut off.

    PORT is GUEST, for all its addresses, or GUEST:PORT or GUEST:/SOCKET for one of them.
    """
    ask(find(vm), {"op": "unexpose", "port": _filled(port)})


def _filled(port: str) -> str:
    [text] = fill_in((port,), dict.fromkeys(("cwd", "notebook_dir"), str(Path.cwd())))
    return text
