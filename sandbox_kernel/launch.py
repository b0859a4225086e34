"""A kernel in a micro-VM for clients that do not know provisioners.

VS Code and others ignore a kernelspec's `kernel_provisioner` and run its argv. This is that argv: it boots
the VM behind the endpoints of the connection file that the client wrote, forwards signals, and ends with
the kernel's exit status. It never runs a kernel on the host.

    python -m sandbox_kernel.launch -f FILE [--kernelspec NAME] [-- GUEST COMMAND…]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from sandbox_kernel.errors import ConfigurationError, SandboxKernelError
from sandbox_kernel.provisioner.command import LAUNCHER, guest_argv
from sandbox_kernel.spec import CAPS, VMSpec, forwarded, from_environment, resolve
from sandbox_kernel.supervisor.control import LaunchRequest
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.trace import summary

_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-f", "file", required=True, help="Connection file, written by the client.")
@click.option("--kernelspec", help="Kernelspec whose configuration of the VM is to be used.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(file: str, kernelspec: str | None, command: tuple[str, ...]) -> None:
    """Boots a micro-VM and runs a kernel in it behind the endpoints of a connection file."""
    try:
        sys.exit(run(Path(file), kernelspec, command))
    except SandboxKernelError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


def run(file: Path, kernelspec: str | None, command: tuple[str, ...]) -> int:
    """Launches, forwards signals, waits; returns the kernel's exit status.

    Raises:
        SandboxKernelError: the VM could not be had; the kernel is then not run at all.
    """
    info = _connection(file)
    argv = guest_argv(
        ["python", "-m", LAUNCHER, "-f", str(file), *(("--", *command) if command else ())], str(file)
    )
    spec = _spec(kernelspec)
    vm = "l" + os.urandom(5).hex()
    request = LaunchRequest(vm, spec, argv, forwarded(spec.env, os.environ), info)
    handle = SupervisorHandle.spawn()
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        handle.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        report = handle.launch(request)
    except BaseException:
        handle.kill()
        handle.wait()
        raise
    print(f"The kernel runs in a micro-VM ({summary(report['trace'])}).", file=sys.stderr, flush=True)
    for number in _FORWARDED_SIGNALS:
        signal.signal(number, lambda got, _: threading.Thread(target=handle.signal, args=(got,)).start())
    status = handle.wait()
    return 0 if stopping.is_set() else status


def _connection(file: Path) -> dict[str, Any]:
    try:
        info = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The connection file {file} cannot be read ({error}); the client must write it."
        ) from error
    if not isinstance(info, dict) or not isinstance(info.get("key"), str):
        raise ConfigurationError(
            f"The connection file {file} holds no connection info; the client must write it."
        )
    return info


def _spec(kernelspec: str | None) -> VMSpec:
    configured: dict[str, Any] = {}
    if kernelspec:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

        try:
            metadata = KernelSpecManager().get_kernel_spec(kernelspec).metadata
        except NoSuchKernel as error:
            raise ConfigurationError(
                f"There is no kernelspec {kernelspec!r}; `jupyter kernelspec list` shows them."
            ) from error
        configured = metadata.get("kernel_provisioner", {}).get("config", {})
    return resolve(
        [
            (f"The kernelspec {kernelspec!r}", configured),
            ("The environment (SANDBOX_KERNEL_…)", from_environment(os.environ)),
        ],
        from_environment(os.environ, tuple(CAPS)),
    )


if __name__ == "__main__":
    main()
