"""The table for a terminal, the same in Markdown for the README, and JSON for machines. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from bench.figures import Figure, ratio, rows, shown, shown_ratio
from bench.machine import Machine

Kernels = Mapping[str, Mapping[str, Figure]]
"""Figures by kernel, then by name; the first kernel is the yardstick."""


def cells(kernels: Kernels) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the table, as text."""
    yardstick, *others = kernels
    headings = ["", *kernels, *("ratio" if len(others) == 1 else f"{name} / {yardstick}" for name in others)]
    made = []
    for name in rows(kernels):
        row = [name, *(shown(figures.get(name)) for figures in kernels.values())]
        for other in others:
            row.append(shown_ratio(ratio(kernels[other].get(name), kernels[yardstick].get(name))))
        made.append(row)
    return headings, made


def table(kernels: Kernels, machine: Machine) -> Table:
    """The table for a terminal."""
    headings, body = cells(kernels)
    made = Table(caption=machine.line(), caption_justify="left")
    for position, heading in enumerate(headings):
        made.add_column(heading, justify="right" if position else "left")
    for row in body:
        made.add_row(*row)
    return made


def markdown(kernels: Kernels, machine: Machine, repeat: int) -> str:
    """The table for the README, with the machine's line under it."""
    headings, body = cells(kernels)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\nMedians of {repeat}, interleaved. {machine.line()}.\n"


def device_lines(device: Mapping[str, Any]) -> list[str]:
    """A line per figure of the vsock device alone: `name: value (…) times a socketpair's`."""
    vsock, plain, ratios = (device.get(key, {}) for key in ("vsock", "socketpair", "ratio"))
    return [
        f"vsock device alone, {name}: {vsock[name]:.4g}, over a socketpair {plain[name]:.4g}, "
        f"ratio {shown_ratio(ratios[name])}"
        for name in vsock
    ]


def document(
    kernels: Kernels, machine: Machine, repeat: int, device: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything for `--json`."""
    yardstick = next(iter(kernels), None)
    return {
        "machine": asdict(machine),
        "repeat": repeat,
        "yardstick": yardstick,
        "kernels": {
            kernel: {
                name: asdict(figure)
                | {"ratio": ratio(figure, kernels[yardstick].get(name) if yardstick else None)}
                for name, figure in figures.items()
            }
            for kernel, figures in kernels.items()
        },
        "vsock_device": device,
    }
