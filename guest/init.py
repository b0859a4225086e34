"""PID 1 of the guest: finishes the boot, starts the agent, then reaps for ever.

Started by the initramfs as `python3 -I -S init.py`, with the root, /proc, /sys and /dev in place. It imports
little, because everything here is emulated on hosts without KVM. A step that fails is named on the console in
one line, which the host puts into its error, and the machine ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import template
    from server import Server

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

HOST_CID = 2
HOSTNAME = "sandbox"


def boot() -> None:
    """Boots, or says what failed."""
    step = "imports"
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        os.environ.clear()
        os.umask(0o022)
        import socket
        import threading

        import cgroup
        import system
        import template
        from agent_protocol import AGENT_PORT
        from children import Children
        from kernel_process import listen
        from operations import Operations
        from server import Server
        from settings import Settings

        began = system.uptime()
        settings = Settings()
        step = "mounts"
        system.mount_all()
        step = "sysctls"
        system.set_sysctls()
        step = "loopback"
        system.loopback_up()
        step = "home"
        os.makedirs(settings.home, exist_ok=True)
        os.chown(settings.home, settings.uid, settings.gid)
        os.chmod(settings.home, 0o700)
        step = "cgroups"
        cgroup.protect(settings)
        step = "vsock"
        listener = listen(settings, AGENT_PORT, 16)
        step = "agent"
        children = Children()
        phases = {"python": began, "agent": system.uptime()}
        operations = Operations(children, settings, phases)
        server = Server(listener, operations.perform, HOST_CID)
        server.start()
        wish = template.wish(system.read("/proc/cmdline"))
        if wish is not None:
            step = "template"
            system.lay_identity()
            if wish.network is not None:
                wish.network.use()
            socket.sethostname(HOSTNAME)
            operations.standby = template.Standby(children, settings, wish.modules)
            threading.Thread(target=become_template, args=(operations.standby, server), daemon=True).start()
    except Exception as error:
        fail(step, error)
    children.reap_forever()


def become_template(standby: template.Standby, server: Server) -> None:
    """Has the VM saved once its kernel is warm, and goes on in a clone, as one more thread that serves."""
    import template

    try:
        if not (standby.until_ready() and template.rehearse(server)):
            raise OSError("the kernel that was to stand by has ended")
        server.start()
        template.await_restore()
    except Exception as error:
        fail("template", error)
    server.serve_forever()


def fail(step: str, error: Exception) -> None:
    """Ends the machine with one line on the console: through Linux' log, which is written before it goes."""
    line = f"SANDBOX-KERNEL-BOOT-FAILED: {step}: {error!r}"
    try:
        with open("/dev/kmsg", "w") as log:
            log.write(f"<1>{line[:800]}")
    except OSError:
        print(line, flush=True)
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("b")
    signal.pause()


if __name__ == "__main__":
    boot()
