"""`sandbox-kernel network`: what a kernel that runs may reach."""

from __future__ import annotations

from typing import Any

import click

from sandbox_kernel.policy import MODES
from sandbox_kernel.supervisor.remote import ask, find


@click.command()
@click.argument("vm")
@click.option("--mode", type=click.Choice(MODES), help="Another policy.")
@click.option("--allow", multiple=True, metavar="RULE", help="Also allow this, as in `network_allow`.")
@click.option("--deny", multiple=True, metavar="RULE", help="Also refuse this, as in `network_deny`.")
@click.option("--forget", multiple=True, metavar="RULE", help="Take a rule away again.")
def network(
    vm: str, mode: str | None, allow: tuple[str, ...], deny: tuple[str, ...], forget: tuple[str, ...]
) -> None:
    """Show, or change, the network policy of VM; connections that are open are judged anew.

    VM is as `sandbox-kernel ps` shows it, or the beginning of that. It must have been started with a network.
    """
    window = find(vm)
    now: dict[str, Any] = ask(window, {"op": "network"})["network"]
    if mode or allow or deny or forget:
        rules = {
            name: [rule for rule in dict.fromkeys((*now[name], *more)) if rule not in forget]
            for name, more in (("network_allow", allow), ("network_deny", deny))
        }
        if mode == "none":
            rules = {}  # none may be left then, of those that allow
        now = ask(window, {"op": "network", "network": mode, **rules})["network"]
    for name, value in now.items():
        click.echo(f"{name:20} {' '.join(value) if isinstance(value, list) else value}")
