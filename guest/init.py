"""PID 1 of the guest: finishes the boot, starts the agent, then reaps for ever.

Started by the initramfs as `python3 -I -S init.py`, with the root, /proc, /sys and /dev in place. It imports
little, because everything here is emulated on hosts without KVM. A step that fails is named on the console in
one line, which the host puts into its error.
"""

from __future__ import annotations

import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

HOST_CID = 2
RESERVE = 40 * 1024 * 1024
"""Bytes of RAM that the kernel's cgroup may not have, so that the agent can still answer."""


def protect() -> None:
    """Gives the agent a cgroup of its own and makes it the last to be killed for want of memory."""
    root = "/sys/fs/cgroup"
    _write(f"{root}/cgroup.subtree_control", "+memory +pids")
    for name in ("agent", "kernel"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _write(f"{root}/agent/cgroup.procs", str(os.getpid()))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _write(f"{root}/kernel/memory.max", str(max(total - RESERVE, total // 2)))
    _write(f"{root}/kernel/memory.oom.group", "1")
    _write("/proc/self/oom_score_adj", "-1000")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main() -> None:
    """Boots, or says what failed."""
    step = "imports"
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        os.environ.clear()
        os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        import socket
        import threading

        import system
        from agent_protocol import AGENT_PORT
        from children import Children
        from kernel_process import GID, HOME, UID
        from operations import Operations
        from server import Server

        step = "mounts"
        system.mount_all()
        step = "loopback"
        system.loopback_up()
        step = "home"
        os.makedirs(HOME, exist_ok=True)
        os.chown(HOME, UID, GID)
        step = "cgroups"
        protect()
        step = "vsock"
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, AGENT_PORT))
        listener.listen(16)
        children = Children()
        server = Server(listener, Operations(children).perform, HOST_CID)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    except Exception as error:
        print(f"SANDBOX-KERNEL-BOOT-FAILED: {step}: {error!r}", flush=True)
        _write("/proc/sysrq-trigger", "b")
        raise
    children.reap_forever()


if __name__ == "__main__":
    main()
