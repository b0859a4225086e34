"""A program that has one network, without a VM: a line in is an expression, a line out is what it gave.

    python network_owner.py FOLDER

`found` is the network, `told` what was said of it; an expression may have `await` in it.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import sys
from pathlib import Path

from sandbox_kernel.errors import SandboxKernelError
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.network import resolver
from sandbox_kernel.network.network import Network
from sandbox_kernel.policy import policy

told: list[str] = []


def descendants(pid: int) -> dict[int, str]:
    """All that has been started, and what it is called."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            name = Path(f"/proc/{child}/comm").read_text().strip()
            found |= {child: name} | descendants(child)
    return found


async def seen(words: str) -> bool:
    """Whether something is said with these words, at last."""
    for _ in range(500):
        if any(words in each for each in told):
            return True
        await asyncio.sleep(0.02)
    return False


async def main(folder: Path) -> None:
    found = Network(Cgroup(()), folder, False)
    found.report_to(lambda: "cell", told.append, lambda said: told.append(f"trouble: {said}"))
    names = {"found": found, "told": told, "seen": seen, "policy": policy, "os": os, "asyncio": asyncio}
    names |= {"descendants": lambda: descendants(os.getpid()), "resolver": resolver}
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        code = compile(line.decode().strip(), "asked", "eval", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        try:
            value = eval(code, names)
            answer = await value if inspect.iscoroutine(value) else value
        except SandboxKernelError as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
