"""`python -m bench`: kernels in turns, every measure on each, one table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from jupyter_client.kernelspec import KernelSpecManager
from rich.console import Console
from rich.progress import Progress

from bench import figures, machine, phases, report
from bench.figures import Sample
from bench.kernel import COLD, FIRST, OPEN, POOLED, WAYS, KernelTrouble, started, variant
from bench.measures import ORDER
from bench.pool import PoolTrouble
from sandbox_kernel.errors import SandboxKernelError

_MICROVM = "python3-microvm"
KERNELS = ("python3", _MICROVM, *(_MICROVM + ending for ending in (FIRST, OPEN, POOLED, COLD)))
DEVICE = "vsock-device"
_DEVICE_PATIENCE = 600.0
_OF_THE_HOST = ("files", "http")
_OF_A_START = ("start", "memory-at-ready")


@dataclass
class Found:
    """What the turns brought.

    Attributes:
        samples: by kernel.
        traces: of each start of a VM, seconds by phase, by kernel.
        accelerator: that a micro-VM reported; empty when none did.
        troubles: a sentence for each turn that did not come to its end.
    """

    samples: dict[str, list[Sample]]
    traces: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    accelerator: str = ""
    troubles: list[str] = field(default_factory=list)


@click.command()
@click.option(
    "--kernel",
    "names",
    multiple=True,
    help=f"A kernelspec, with {COLD!r} behind it for a VM that boots, {POOLED!r} for one of a pool, "
    f"{OPEN!r} for one with a directory of the host and a network, "
    f"{FIRST!r} for a client's first one; the first named is the yardstick.",
)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns per kernel.")
@click.option("--only", multiple=True, type=click.Choice([*ORDER, DEVICE]), help="Only this measure.")
@click.option("--trace", is_flag=True, help="Print the phases of a VM's start, too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here.")
@click.option("--markdown", is_flag=True, help="Print the README's table instead of the terminal's.")
def main(
    names: tuple[str, ...],
    repeat: int,
    only: tuple[str, ...],
    trace: bool,
    json_file: Path | None,
    markdown: bool,
) -> None:
    """Measures the plain kernel and the micro-VM kernel side by side."""
    console = Console() if sys.stdout.isatty() else Console(width=180)
    chosen = names or KERNELS
    known = KernelSpecManager().find_kernel_specs()
    if missing := [kernelspec for kernelspec, _ in map(variant, chosen) if kernelspec not in known]:
        raise click.ClickException(
            f"There is no kernelspec {missing[0]!r}; `sandbox-kernel setup` installs python3-microvm, "
            "`python -m ipykernel install --sys-prefix` installs python3."
        )
    wanted = [name for name in ORDER if not only or name in only]
    found = _measure(_labels(chosen), wanted, repeat) if wanted else Found({})
    starts = {label: phases.summarise(traces) for label, traces in found.traces.items()}
    device = None
    if not only or DEVICE in only:
        try:
            device = _device()
        except KernelTrouble as error:
            found.troubles.append(str(error))
    kernels = {label: figures.summarise(samples) for label, samples in found.samples.items()}
    where = machine.look(found.accelerator)
    if kernels and markdown:
        click.echo(report.markdown(kernels, where, repeat))
    elif kernels:
        console.print(report.table(kernels, where))
    for label, reached in starts.items() if trace else ():
        console.print(phases.table(label, reached))
    for line in report.device_lines(device or {}):
        console.print(line, highlight=False, soft_wrap=True)
    if json_file is not None:
        document = report.document(kernels, where, repeat, device)
        document |= {"phases": phases.document(starts), "troubles": found.troubles}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    for trouble in found.troubles:
        click.echo(trouble, err=True)
    sys.exit(1 if found.troubles else 0)


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Kernelspecs by label; one that is named twice gets a number, for a run against itself."""
    return {
        name if name not in names[:position] else f"{name} #{names[: position + 1].count(name)}": name
        for position, name in enumerate(names)
    }


def _measure(labels: dict[str, str], wanted: Sequence[str], repeat: int) -> Found:
    """All turns. A turn that goes wrong ends there; what it measured before counts, and the run goes on."""
    found = Found({label: [] for label in labels})
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=repeat * len(labels))
        for number in range(1, repeat + 1):
            for label, name in labels.items():
                progress.update(task, description=f"{label}, turn {number} of {repeat}")
                measure = "start"
                try:
                    with started(name) as turn:
                        found.accelerator = turn.accelerator or found.accelerator
                        if turn.phases:
                            found.traces.setdefault(label, []).append(turn.phases)
                        for measure in _measures_of(name, wanted):
                            found.samples[label] += ORDER[measure](turn)
                except (KernelTrouble, PoolTrouble, SandboxKernelError, RuntimeError, OSError) as error:
                    found.troubles.append(f"{label}, turn {number}, {measure}: {error}")
                progress.advance(task)
    return found


def _measures_of(name: str, wanted: Sequence[str]) -> list[str]:
    """A VM that booted or waited differs from one that was restored in its start and its memory alone.

    The host's files and servers are measured where the kernel has them.
    """
    if name.endswith(OPEN):
        return [measure for measure in wanted if measure in (*_OF_A_START, *_OF_THE_HOST)]
    if name.endswith(tuple(WAYS)):
        return [measure for measure in wanted if measure in _OF_A_START]
    return [measure for measure in wanted if measure not in _OF_THE_HOST or name != _MICROVM]


def _device() -> dict[str, Any]:
    """What `bench.vsock_device` found, in a process of its own.

    Raises:
        KernelTrouble: it failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = subprocess.run(
            [sys.executable, "-m", "bench.vsock_device", "--json", file.name],
            capture_output=True,
            text=True,
            timeout=_DEVICE_PATIENCE,
            check=False,
        )
        if done.returncode:
            raise KernelTrouble(f"bench.vsock_device failed:\n{done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(Path(file.name).read_text())
        return found


if __name__ == "__main__":
    main()
