"""The provisioner's decisions before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.provisioner.microvm import MicroVMProvisioner


def provisioner(
    config: dict[str, object] | None = None, traits: dict[str, object] | None = None
) -> MicroVMProvisioner:
    spec = KernelSpec(
        argv=["python", "-m", "sandbox_kernel.launch", "-f", "{connection_file}"], env={"A": "1"}
    )
    manager = KernelManager(config=Config({"MicroVMProvisioner": traits or {}}), kernel_name="x")
    manager._kernel_spec = spec
    return MicroVMProvisioner(kernel_id="k1", kernel_spec=spec, parent=manager, **(config or {}))


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))


async def test_a_kernelspec_overrides_traits_and_traits_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SANDBOX_KERNEL_MEMORY", "400")
    monkeypatch.setenv("SANDBOX_KERNEL_PROCESSES", "99")
    made = provisioner({"memory": 600}, {"memory": 500, "vcpus": 2})
    await made.pre_launch(env={})
    assert (made._spec.memory, made._spec.vcpus, made._spec.processes) == (600, 2, 99)


async def test_an_administrators_cap_binds_the_kernelspec() -> None:
    with pytest.raises(ConfigurationError) as caught:
        await provisioner({"memory": 4096}, {"max_memory": 2048}).pre_launch(env={})
    assert str(caught.value) == (
        "The kernelspec 'x' sets memory to 4096, over the administrator's limit max_memory = 2048; "
        "ask for 2048 or less."
    )


async def test_an_unknown_key_of_a_kernelspec_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"The kernelspec 'x' sets 'ram', which is no key"):
        await provisioner({"ram": 1}).pre_launch(env={})


async def test_only_allowed_variables_are_forwarded() -> None:
    made = provisioner({"env": ["LC_*"]})
    launch = await made.pre_launch(env={"LC_ALL": "C", "SECRET": "x", "JPY_SESSION_NAME": "n.ipynb"})
    assert launch["env"] == {"LC_ALL": "C", "JPY_SESSION_NAME": "n.ipynb", "A": "1"}


async def test_ipc_endpoints_lie_in_a_folder_of_the_vms_own_and_stay_over_restarts(tmp_path: Path) -> None:
    made = provisioner()
    await made.pre_launch(env={})
    first = dict(made.connection_info)
    await made.pre_launch(env={})
    assert dict(made.connection_info) == first
    assert first["transport"] == "ipc"
    assert str(first["ip"]) == str(tmp_path / "sandbox-kernel" / made._vm_id() / "k")
    assert isinstance(first["key"], bytes)


async def test_two_provisioners_do_not_share_connection_info() -> None:
    one, other = provisioner(), provisioner()
    await one.pre_launch(env={})
    assert not other.connection_info


async def test_tcp_keeps_the_managers_address() -> None:
    made = provisioner({"transport": "tcp"})
    await made.pre_launch(env={})
    assert (made.connection_info["transport"], made.connection_info["ip"]) == ("tcp", "127.0.0.1")
    await made.cleanup()


async def test_without_a_launch_there_is_nothing_to_signal_or_to_wait_for() -> None:
    made = provisioner()
    await made.send_signal(2)
    await made.kill()
    await made.terminate()
    await made.cleanup()
    await made.cleanup()
    assert not made.has_process
    assert await made.wait() is None
    assert await made.poll() == 0


def test_no_path_of_the_guest_is_a_path_of_the_host() -> None:
    assert provisioner().resolve_path("/home/sandbox/x.py") is None


async def test_an_administrators_number_of_ports_binds_the_kernelspec() -> None:
    with pytest.raises(ConfigurationError) as caught:
        await provisioner({"expose": ["80", "81"]}, {"max_expose": 1}).pre_launch(env={})
    assert str(caught.value) == (
        "Ports to be exposed: 2, over the administrator's limit max_expose = 1; expose 1 or fewer."
    )


async def test_a_port_that_the_system_chose_is_asked_for_again_while_it_is_free() -> None:
    made = provisioner({"expose": ["80", "81:0", "82:9000", "83:/s", "80"]})
    await made.pre_launch(env={})
    assert made._exposed_as_before() == ("80", "81:0", "82:9000", "83:/s", "80")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (taken, other)]
        other.close()
        made.report = {
            "exposed": [
                {"port": 80, "address": f"127.0.0.1:{ports[0]}"},
                {"port": 81, "address": f"127.0.0.1:{ports[1]}"},
                {"port": 83, "address": "/s"},
            ]
        }
        assert made._exposed_as_before() == ("80", f"81:{ports[1]}", "82:9000", "83:/s", "80")
