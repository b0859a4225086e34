"""The exposed ports of one VM: all or none, never more than allowed, taken away by name."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigurationError, GuestProtocolError
from sandbox_kernel.exposure import Exposure
from sandbox_kernel.ports.listener import is_free
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.belongings import Belongings
from sandbox_kernel.supervisor.ports import Ports


def there(path: str) -> bool:
    return Path(path).exists()


@pytest.fixture
async def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ports]:
    """Of a VM that has its belongings and is not running; two at most."""
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    ours, theirs = socket.socketpair()
    with ours, theirs:
        violations: list[GuestProtocolError] = []
        belongings = Belongings("abc", VMSpec(), theirs.fileno())
        made = Ports(belongings, 2, violations.append)
        yield made
        await made.aclose()
        belongings._guardian.dismiss()
        for handler in set(root.handlers) - set(handlers):  # a supervisor has its process to itself
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        assert not violations


async def test_who_adds_a_port_to_a_running_vm_is_bound_by_the_administrators_number(ports: Ports) -> None:
    ports.listen([Exposure(80)])
    assert ports.add(Exposure(81)).port
    with pytest.raises(ConfigurationError) as caught:
        ports.add(Exposure(82))
    assert str(caught.value) == (
        "Ports to be exposed: 3, over the administrator's limit max_expose = 2; expose 2 or fewer."
    )
    assert [each.guest for each in ports.exposures] == [80, 81]


async def test_of_several_ports_none_is_exposed_if_one_cannot_be(ports: Ports) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, first = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        with pytest.raises(ConfigurationError, match=f"port {port} of this host"):
            ports.listen([Exposure(80, first), Exposure(81, port)])
        assert ports.exposures == ()
        assert is_free(first)


async def test_a_port_is_taken_away_at_one_address_or_at_all(ports: Ports, tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    ports.listen([Exposure(80), Exposure(80, None, path)])
    first = ports.exposures[0]
    with pytest.raises(ConfigurationError) as caught:
        await ports.remove(Exposure(81))
    assert str(caught.value) == f"81 is not exposed; there are: 80:{first.port}, 80:{path}."
    await ports.remove(Exposure(80, None, path))
    assert (ports.exposures, there(path)) == ((first,), False)
    ports.add(Exposure(80, None, path))
    await ports.remove(Exposure(80))
    assert (ports.exposures, there(path)) == ((), False)
