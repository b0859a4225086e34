"""`python -m bench`: kernels in turns, every measure on each, one table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from jupyter_client.kernelspec import KernelSpecManager
from rich.console import Console
from rich.progress import Progress

from bench import figures, machine, report
from bench.figures import Sample
from bench.kernel import KernelTrouble, started
from bench.measures import ORDER

KERNELS = ("python3", "python3-microvm")
DEVICE = "vsock-device"
_DEVICE_PATIENCE = 600.0


@click.command()
@click.option(
    "--kernel", "names", multiple=True, help="A kernelspec; the first is the yardstick.  [python3, …-microvm]"
)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns per kernel.")
@click.option("--only", multiple=True, type=click.Choice([*ORDER, DEVICE]), help="Only this measure.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here.")
@click.option("--markdown", is_flag=True, help="Print the README's table instead of the terminal's.")
def main(
    names: tuple[str, ...], repeat: int, only: tuple[str, ...], json_file: Path | None, markdown: bool
) -> None:
    """Measures the plain kernel and the micro-VM kernel side by side."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    chosen = names or KERNELS
    known = KernelSpecManager().find_kernel_specs()
    if missing := [name for name in chosen if name not in known]:
        raise click.ClickException(
            f"There is no kernelspec {missing[0]!r}; `sandbox-kernel setup` installs python3-microvm, "
            "`python -m ipykernel install --sys-prefix` installs python3."
        )
    wanted = [name for name in ORDER if not only or name in only]
    try:
        samples, accelerator = _measure(_labels(chosen), wanted, repeat) if wanted else ({}, "")
        device = _device() if not only or DEVICE in only else None
    except KernelTrouble as error:
        raise click.ClickException(str(error)) from error
    kernels = {label: figures.summarise(found) for label, found in samples.items()}
    where = machine.look(accelerator)
    if kernels and markdown:
        click.echo(report.markdown(kernels, where, repeat))
    elif kernels:
        console.print(report.table(kernels, where))
    for line in report.device_lines(device or {}):
        console.print(line, highlight=False, soft_wrap=True)
    if json_file is not None:
        found = report.document(kernels, where, repeat, device)
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Kernelspecs by label; one that is named twice gets a number, for a run against itself."""
    return {
        name if name not in names[:position] else f"{name} #{names[: position + 1].count(name)}": name
        for position, name in enumerate(names)
    }


def _measure(
    labels: dict[str, str], wanted: Sequence[str], repeat: int
) -> tuple[dict[str, list[Sample]], str]:
    """All samples by label, and the accelerator that a micro-VM reported."""
    samples: dict[str, list[Sample]] = {label: [] for label in labels}
    accelerator = ""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=repeat * len(labels) * len(wanted))
        for number in range(1, repeat + 1):
            for label, name in labels.items():
                progress.update(task, description=f"{label}, turn {number} of {repeat}")
                with started(name) as turn:
                    told = getattr(turn.manager.provisioner, "report", {}).get("accelerator")
                    accelerator = told[0] if told else accelerator
                    for measure in wanted:
                        try:
                            samples[label] += ORDER[measure](turn)
                        except KernelTrouble as error:
                            raise KernelTrouble(f"{label}, {measure}: {error}") from error
                        progress.advance(task)
    return samples, accelerator


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
