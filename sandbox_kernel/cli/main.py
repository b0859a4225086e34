"""The entry point: subcommands, and what becomes of errors.

An error that this package foresees is one sentence on standard error and exit status 1. An interruption
(Ctrl-C, SIGTERM) is an exception like any other, so that whatever is going on cleans up first.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import click

from sandbox_kernel.cli.copy import cp
from sandbox_kernel.cli.doctor import doctor
from sandbox_kernel.cli.expose import expose, unexpose
from sandbox_kernel.cli.image import image
from sandbox_kernel.cli.kernelspec import kernelspec
from sandbox_kernel.cli.logs import logs
from sandbox_kernel.cli.mount import mount, mounts, unmount
from sandbox_kernel.cli.network import network
from sandbox_kernel.cli.pool import pool
from sandbox_kernel.cli.setup import setup
from sandbox_kernel.cli.template import template
from sandbox_kernel.cli.usage import ps, stats
from sandbox_kernel.cli.volume import volume
from sandbox_kernel.errors import SandboxKernelError


class Commands(click.Group):
    """A group whose commands may raise this package's errors."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the chosen command; turns an expected error into a sentence and exit status 1."""
        try:
            return super().invoke(context)
        except SandboxKernelError as error:
            click.echo(f"sandbox-kernel: {error}", err=True)
            context.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sandbox-kernel", prog_name="sandbox-kernel")
def main() -> None:
    """Jupyter kernels that run inside micro-VMs."""
    signal.signal(signal.SIGTERM, _stop)


for command in (
    *(setup, doctor, image, template, pool, kernelspec),
    *(ps, stats, logs, cp, mount, unmount, mounts, network, expose, unexpose, volume),
):
    main.add_command(command)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
