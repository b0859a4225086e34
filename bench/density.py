"""How many kernels a machine holds, and how they start when there are many.

    many starts at once    threads, one KernelManager each; seconds until all have answered
    a crowd that grows     idle kernels, alive at the same time; at some counts their memory, CPU and latest
                           start are looked at; at the end every kernel has to answer 1+1 correctly

`python -m bench.density`; the first kernel is the yardstick, of which few suffice.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from bench import growth, machine, pool
from bench.crowd import Crowd, surroundings
from bench.growth import AtOnce, Growth, Point
from bench.kernel import KernelTrouble
from sandbox_kernel.errors import SandboxKernelError

KERNELS = ("python3", "python3-microvm")
YARDSTICK_MOST = 20
_IDLE = 5.0
"""Seconds over which the CPU is watched."""
_SETTLE = 3.0
"""Seconds from a start until a kernel is idle."""
_MIB = 1024

Tell = Callable[[str], None]


class Counts(click.ParamType):
    """Numbers of kernels, in ascending order: `1,10,50`."""

    name = "counts"

    def convert(
        self, value: object, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        """See `click.ParamType.convert`."""
        words = str(value).split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is no list of numbers from 1, such as 1,10,50", parameter, context)
        return tuple(sorted({int(word) for word in words}))


@click.command()
@click.option("--kernel", "names", multiple=True, help="As of `python -m bench`; the first is the yardstick.")
@click.option(
    "--counts", type=Counts(), default="1,10,50,100", show_default=True, help="Live kernels to look at."
)
@click.option("--most", type=click.IntRange(1), default=500, show_default=True, help="Live kernels at most.")
@click.option(
    "--starts-at-once", type=click.IntRange(0), default=20, show_default=True, help="0 leaves this out."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the growth here (.png or .svg).")
def main(
    names: tuple[str, ...],
    counts: tuple[int, ...],
    most: int,
    starts_at_once: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measures how many kernels this machine holds, and many starts at once."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    _raise_file_limit()

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    chosen = names or KERNELS
    bursts: list[AtOnce] = []
    grown: list[Growth] = []
    troubles: list[str] = []
    for name in chosen if starts_at_once else ():
        try:
            bursts.append(burst(name, starts_at_once))
            tell(bursts[-1].line())
        except (KernelTrouble, pool.PoolTrouble, SandboxKernelError, RuntimeError, OSError) as error:
            troubles.append(f"{starts_at_once} starts of {name} at once: {error}")
    for position, name in enumerate(chosen):
        limit = most if position else min(most, YARDSTICK_MOST)
        grown.append(grow(name, counts, limit))
        console.print(growth.table(grown[-1]))
        for line in growth.lines(grown[-1]):
            tell(line)
        troubles += [f"{name}: {sentence}" for sentence in grown[-1].wrong]
        if grown[-1].failed and len(grown[-1].starts) < min(limit, max(counts)):
            troubles.append(f"{name}, start {len(grown[-1].starts) + 1}: {grown[-1].failed}")
    where = machine.look()
    tell(where.line())
    if json_file is not None:
        document = {
            "machine": asdict(where),
            "at_once": [asdict(each) for each in bursts],
            "growth": [each.document() for each in grown],
            "troubles": troubles,
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    if picture is not None:
        from bench.picture import draw

        draw(grown, picture)
    for trouble in troubles:
        click.echo(trouble, err=True)
    sys.exit(1 if troubles else 0)


def burst(name: str, count: int) -> AtOnce:
    """Many starts at once.

    Raises:
        KernelTrouble: a kernel did not do what it was to.
    """
    with surroundings(name, count):
        crowd = Crowd(name)
        try:
            wall, seconds = crowd.start_at_once(count)
        finally:
            crowd.end()
    return AtOnce(name, wall, tuple(seconds))


def grow(name: str, counts: tuple[int, ...], most: int) -> Growth:
    """Starts one kernel after the other until it is enough; looks at the crowd at `counts` and at the end."""
    grown = Growth(name)
    available, total = _ram()
    before = available
    with surroundings(name, 1) as own_pool:
        crowd = Crowd(name)
        try:
            while not grown.end:
                try:
                    if own_pool is not None:
                        own_pool.until_ready()
                    grown.starts.append(crowd.add())
                    grown.traces = crowd.traces
                except (KernelTrouble, pool.PoolTrouble, SandboxKernelError, RuntimeError, OSError) as error:
                    grown.failed = str(error) or repr(error)
                    grown.end = f"the next start failed: {grown.failed}"
                    break
                available, total = _ram()
                grown.end = growth.enough(len(crowd), most, available, total, grown.starts[-1])
                if len(crowd) in counts:
                    grown.points.append(_look(crowd, before))
            if len(crowd) not in (0, *(point.count for point in grown.points)):
                grown.points.append(_look(crowd, before))
            grown.trips, grown.wrong = crowd.check()
        finally:
            crowd.end()
    return grown


def _look(crowd: Crowd, before: float) -> Point:
    time.sleep(_SETTLE)
    cpu = crowd.cpu(_IDLE)
    available = before - _ram()[0]
    return Point(len(crowd), *crowd.memory(), available, cpu)


def _ram() -> tuple[float, float]:
    """MiB of RAM: available to programs, and all (proc(5), meminfo)."""
    sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) / _MIB, int(sizes["MemTotal"].split()[0]) / _MIB


def _raise_file_limit() -> None:
    """Each kernel costs this process some descriptors; a user's usual limit of 1024 is soon reached."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
