"""What a supervisor takes from the process that starts it: who has it start elsewhere must have the same."""

from __future__ import annotations

import shutil
from pathlib import Path

from sandbox_kernel import paths

_NAMESPACES = ("mnt", "net", "pid", "user", "ipc")
_TOOLS = ("qemu-system-x86_64", "bwrap")


def surroundings() -> dict[str, str]:
    """This process's own: the package, the folders, the tools, the namespaces (namespaces(7))."""
    package = Path(__file__).parent.parent
    return {
        "package": f"{package} {package.stat().st_mtime_ns}",
        "data": str(paths.data_dir()),
        "cache": str(paths.cache_dir()),
        "logs": str(paths.log_dir()),
        "runtime": str(paths.runtime_dir()),
        **{tool: str(shutil.which(tool)) for tool in _TOOLS},
        **{name: str(Path("/proc/self/ns", name).readlink()) for name in _NAMESPACES},
    }
