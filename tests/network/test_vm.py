"""A VM's network begins and ends with it, says why when it ends before, and is not there by default."""

from __future__ import annotations

import psutil
import pytest

from sandbox_kernel.host import template
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.spec import VMSpec
from tests.microvm import alive, until
from tests.network.conftest import World
from tests.vm.conftest import LIMIT

PARTS = {"holder", "slirp4netns", "dnsmasq"}


@pytest.fixture(scope="module")
def restored(place: World) -> World:
    """A restored kernel with an allowlist, in place of the attacker's."""
    template.ensure(VMSpec(network="allowlist"), Silent())
    place.start(network="allowlist", network_allow=["example.org"])
    return place


def parts(supervisor: int) -> dict[str, psutil.Process]:
    """The processes of a VM's network."""
    found = {}
    for process in psutil.Process(supervisor).children(recursive=True):
        holds = process.name().startswith("python") and "sandbox_kernel.network.holder" in process.cmdline()
        name = "holder" if holds else process.name()
        if name in PARTS:
            found[name] = process
    return found


def supervisor_of(world: World) -> int:
    pid: int = world.ask(op="usage")["usage"]["supervisor"]
    return pid


def test_a_restored_kernel_has_the_network_from_its_first_cell_on(restored: World) -> None:
    assert restored.value("reach('example.org', 443)") == "93.184.216.34 443"
    assert restored.ask(op="usage")["usage"]["start"] == "restored"


def test_the_command_shows_policy_and_refusals_and_changes_them(restored: World) -> None:
    assert restored.value("look_up('other.org')") == "gaierror"
    shown = restored.command("logs", "--network")
    assert "other.org" in shown
    assert "no rule allows this name" in shown
    assert "network_allow        example.org other.org" in restored.command("network", "--allow", "other.org")
    assert restored.value("reach('other.org', 443)") == "93.184.216.99 443"
    restored.command("network", "--forget", "other.org")
    assert restored.value("look_up('other.org')") == "gaierror"


def test_usage_tells_what_passed(restored: World) -> None:
    before = restored.ask(op="usage")["usage"]["network"]
    restored.value("len(__import__('urllib.request').request.urlopen('http://example.org/500000').read())")
    after = restored.ask(op="usage")["usage"]["network"]
    assert after["received"] - before["received"] > 500_000
    assert after["sent"] > before["sent"]


def test_another_vm_of_the_same_user_is_not_reached(restored: World) -> None:
    cell = """
        import socket, threading
        listener = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
        def serve():
            while True: listener.accept()[0].sendall(b"the neighbour")
        threading.Thread(target=serve, daemon=True).start()
        print(socket.create_connection(("127.0.0.1", 9000), 5).recv(99))
        """
    restored.neighbour(cell, network="full", memory=512)
    restored.policy("full", ("198.18.0.0/15", "fc00::/7"))
    for address in ("198.18.0.2", "198.18.0.3", "198.18.1.100", "198.18.1.2", "fd53:4b::2", "fd00::100"):
        assert restored.value(f"reach({address!r}, 9000, 4)") != "the neighbour", address
    restored.policy("allowlist", ("example.org",))


def test_the_supervisor_has_no_socket_that_a_network_reaches(restored: World) -> None:
    supervisor = psutil.Process(supervisor_of(restored))
    assert supervisor.net_connections(kind="inet") == []


def test_a_resolver_or_an_uplink_that_ends_is_told_and_lets_nothing_through(restored: World) -> None:
    found = parts(supervisor_of(restored))
    assert set(found) == PARTS
    found["dnsmasq"].kill()
    assert until(lambda: "DNS server has ended" in restored.run("pass"), LIMIT)
    found["slirp4netns"].kill()
    assert until(lambda: "network has ended (the uplink" in restored.run("pass"), LIMIT)
    assert restored.value("reach('93.184.216.34', 443, 3)") in ("TimeoutError", "OSError")
    assert restored.value("1 + 1") == 2


def test_nothing_of_a_network_outlives_a_supervisor_that_is_killed(restored: World) -> None:
    restored.start(network="public")
    supervisor = supervisor_of(restored)
    found = parts(supervisor)
    assert set(found) == PARTS
    psutil.Process(supervisor).kill()
    assert until(lambda: not alive(list(found.values())), LIMIT)


def test_nothing_of_a_network_outlives_an_orderly_end(restored: World) -> None:
    restored.start(network="full")
    found = parts(supervisor_of(restored))
    assert set(found) == PARTS
    restored.stop()
    assert until(lambda: not alive(list(found.values())), LIMIT)


def test_by_default_there_is_no_device(place: World) -> None:
    place.start()
    assert place.value("__import__('os').listdir('/sys/class/net')") == ["lo"]
    assert place.value("reach('93.184.216.34', 443)") == "OSError"
    with pytest.raises(RuntimeError, match="This VM has no network device; start the kernel with `network`"):
        place.policy("full")


def test_an_administrators_widest_policy_binds_kernelspec_and_running_kernel(place: World) -> None:
    with pytest.raises(RuntimeError, match="over the administrator's limit max_network = allowlist"):
        place.start(network="public", max_network="allowlist")
    place.start(network="allowlist", max_network="allowlist")
    with pytest.raises(RuntimeError, match="over the administrator's limit max_network = allowlist"):
        place.policy("full")
