"""Prints an executed notebook's outputs, and this host's kernel beside the guest's."""

from __future__ import annotations

import platform
import sys
from datetime import datetime

import nbformat
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax


def main(path: str) -> None:
    """Shows the notebook at `path`."""
    console = Console()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        console.print(Rule(f"In [{cell.execution_count}] {_seconds(cell)}", align="left", style="dim"))
        console.print(Syntax(cell.source, "python", background_color="default"))
        for output in cell.outputs:
            console.print(_text(output), style="green", markup=False, highlight=False)
    console.print(Rule(style="dim"))
    console.print(f"host kernel   {platform.release()}", highlight=False)
    console.print(f"guest kernel  {_guest_kernel(notebook)}", highlight=False)


def _seconds(cell: nbformat.NotebookNode) -> str:
    """How long the cell took, from the times that nbclient has noted in it."""
    noted = cell.metadata.get("execution", {})
    try:
        began, ended = noted["iopub.execute_input"], noted["shell.execute_reply"]
    except KeyError:
        return ""
    return f"{(datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds():.2f} s"


def _text(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return str(output.text).rstrip()
    data = output.get("data", {})
    pictures = [f"[{kind}, {len(data[kind])} bytes in base64]" for kind in data if kind.startswith("image/")]
    return "\n".join(pictures) or str(data.get("text/plain", ""))


def _guest_kernel(notebook: nbformat.NotebookNode) -> str:
    """What the first cell's first output says."""
    return _text(notebook.cells[1].outputs[0]).split()[-1]


if __name__ == "__main__":
    main(sys.argv[1])
