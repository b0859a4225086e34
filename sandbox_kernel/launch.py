"""A kernel in a micro-VM for clients that do not know provisioners.

VS Code and others ignore a kernelspec's `kernel_provisioner` and run its argv. This is that argv: it boots
the VM behind the endpoints of the connection file that the client wrote, forwards signals, and ends with
the kernel's exit status. It never runs a kernel on the host.

    python -m sandbox_kernel.launch -f FILE [--kernelspec NAME] [--trace] [-- GUEST COMMAND…]
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

from sandbox_kernel.errors import ConfigurationError, GuestError, HostError, SandboxKernelError
from sandbox_kernel.host.kernelspec import spec_of
from sandbox_kernel.mount import places
from sandbox_kernel.pool.client import take
from sandbox_kernel.provisioner.command import LAUNCHER, guest_argv
from sandbox_kernel.spec import forwarded, max_expose, mount_roots, placed
from sandbox_kernel.supervisor.control import LaunchRequest
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.trace import lines, summary

_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-f", "file", required=True, help="Connection file, written by the client.")
@click.option("--kernelspec", help="Kernelspec whose configuration of the VM is to be used.")
@click.option("--trace", is_flag=True, help="Print when each phase of the start was done, to stderr.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(file: str, kernelspec: str | None, trace: bool, command: tuple[str, ...]) -> None:
    """Boots a micro-VM and runs a kernel in it behind the endpoints of a connection file."""
    try:
        sys.exit(run(Path(file), kernelspec, command, trace))
    except SandboxKernelError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


def run(file: Path, kernelspec: str | None, command: tuple[str, ...], trace: bool = False) -> int:
    """Launches, forwards signals, waits; returns the kernel's exit status.

    With `trace` the phases of the start go to stderr, one a line, when the kernel is up.

    Raises:
        SandboxKernelError: the VM could not be had; the kernel is then not run at all.
    """
    info = _connection(file)
    argv = guest_argv(
        ["python", "-m", LAUNCHER, "-f", str(file), *(("--", *command) if command else ())], str(file)
    )
    roots = mount_roots(os.environ, None)
    most = max_expose(os.environ, None)
    where = places(None, os.environ.get("JPY_SESSION_NAME", ""))
    spec = placed(spec_of(kernelspec), where, roots, most)
    vm = "l" + os.urandom(5).hex()
    env = forwarded(spec.env, os.environ)
    request = LaunchRequest(vm, spec, argv, env, info, mount_roots=roots, max_expose=most)
    stopping = threading.Event()
    handles: list[SupervisorHandle] = []

    def stop(*_: object) -> None:
        stopping.set()
        for handle in handles:
            handle.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    report = _launch(request, handles)
    handle = handles[-1]
    print(f"The kernel runs in a micro-VM ({summary(report['trace'])}).", file=sys.stderr, flush=True)
    for each in report["exposed"]:
        print(f"Port {each['port']} is exposed at {each['address']}.", file=sys.stderr, flush=True)
    if trace:
        print(*lines(handle.status()["trace"]), sep="\n", file=sys.stderr, flush=True)
    for number in _FORWARDED_SIGNALS:
        signal.signal(number, lambda got, _: threading.Thread(target=handle.signal, args=(got,)).start())
    status = handle.wait()
    return 0 if stopping.is_set() else status


def _launch(request: LaunchRequest, handles: list[SupervisorHandle]) -> dict[str, Any]:
    """Launches in a VM of the pool's or, where there is none that works, in one of its own.

    The supervisor that is in use is the last of `handles`.
    """
    handle = take(request.spec)
    if handle is not None:
        try:
            return _launch_in(handle, request, handles)
        except (GuestError, HostError) as error:
            print(f"The pool's VM is of no use: {error}", file=sys.stderr, flush=True)
    return _launch_in(SupervisorHandle.spawn(), request, handles)


def _launch_in(
    handle: SupervisorHandle, request: LaunchRequest, handles: list[SupervisorHandle]
) -> dict[str, Any]:
    handles.append(handle)
    try:
        return handle.launch(request)
    except BaseException:
        handle.kill()
        handle.wait()
        raise


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


if __name__ == "__main__":
    main()
