"""Run by test_errors.py in namespaces of its own: starts a kernel where one folder's file system is full.

Arguments: the variable that names the folder, what is exhausted (blocks or inodes), the folder.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from sandbox_kernel.errors import SandboxKernelError
from tests.microvm import microvm


def main() -> None:
    variable, exhausted, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64", "none", folder], check=True)
    os.environ[variable] = str(folder)
    with contextlib.suppress(OSError):
        if exhausted == "inodes":
            for number in range(64):
                (folder / str(number)).touch()
        else:
            (folder / "all").write_bytes(bytes(64 << 10))
    try:
        with microvm() as kernel:
            print(kernel.run("6 * 7"))
    except SandboxKernelError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
