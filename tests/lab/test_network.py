"""In the lab only: networks of a user who is not root, with hardware acceleration and the kernel's vsock."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from tests.microvm import Kernel, microvm, traces, until

GONE = 2.0
"""Seconds within which everything of a killed kernel must be gone (SPECIFICATION.md, 'Clean-up')."""
REACH = """
import socket
try:
    with socket.create_connection(("host.internal", {port}), 5) as connection:
        print(connection.recv(9).decode())
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this host's loopback on which everybody is greeted."""
    with socket.create_server(("127.0.0.1", 0)) as service:

        def greet() -> None:
            with suppress(OSError):
                while True:
                    with service.accept()[0] as connection:
                        connection.sendall(b"hello")

        threading.Thread(target=greet, daemon=True).start()
        yield service.getsockname()[1]
        service.shutdown(socket.SHUT_RDWR)


def noted(kernel: Kernel) -> list[str]:
    """Why connections were refused so far."""
    log = Path(kernel.manager.provisioner.report["logs"], "network.log")
    return [json.loads(line)["rule"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("start", ["cold", "restored"])
def test_a_user_who_is_no_root_has_a_network_by_policy(installed: None, port: int, start: str) -> None:
    assert os.getuid() != 0
    if start == "restored":
        template.ensure(VMSpec(network="allowlist"), Silent())
    config = {"network": "allowlist", "host_services": [str(port)]}
    with microvm(**config, start="cold" if start == "cold" else "auto") as kernel:
        report = kernel.manager.provisioner.report
        assert (report["start"], report["accelerator"][0], report["vsock"][0]) == (start, "kvm", "kernel")
        assert kernel.run(REACH.format(port=port)) == "hello"
        refused = kernel.run(REACH.format(port=port + 1))
        assert f"The network policy (allowlist) refused 198.18.0.1:{port + 1} (tcp)" in refused
        assert refused.endswith("ConnectionRefusedError")
        assert until(lambda: bool(noted(kernel)), GONE)
        vm = kernel.manager.provisioner._vm_id()
        kernel.supervisor.kill()
        assert until(lambda: not traces(vm), GONE), traces(vm)
