"""Where clients connect: the files, their mode, what is in the way; and encryption."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from sandbox_kernel.errors import ConfigurationError, HostError
from sandbox_kernel.relay.relay import ClientEndpoints, Relay
from tests.relay.conftest import MakeRig
from tests.relay.conversation import run
from tests.relay.rig import READY

FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


def test_the_sockets_belong_to_the_user_alone(make_rig: MakeRig) -> None:
    files = list(make_rig().folder.iterdir())
    assert len(files) == 5
    assert {stat.filemode(file.stat().st_mode) for file in files} == {"srw-------"}


def test_stale_sockets_are_replaced(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.thread.run(rig.relay.aclose())
    for address in rig.addresses.values():
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(address.removeprefix("ipc://"))
    relay = rig.thread.call(Relay)
    rig.thread.call(lambda: relay.bind(ClientEndpoints(rig.addresses), b"", "hmac-sha256"))
    rig.start_kernel()
    rig.thread.run(relay.attach(rig.dial))
    rig.thread.call(relay.start)
    rig.thread.run(relay.aclose())


async def _bind(addresses: dict[str, str]) -> None:
    relay = Relay()
    try:
        relay.bind(ClientEndpoints(addresses), b"", "hmac-sha256")
    finally:
        await relay.aclose()


async def test_a_file_in_the_way_is_not_removed(make_rig: MakeRig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigurationError, match="no socket"):
        await _bind(make_rig().addresses | {"control": f"ipc://{tmp_path}/file"})
    assert (tmp_path / "file").read_text() == "precious"


async def test_a_path_too_long_for_a_socket_is_refused(make_rig: MakeRig) -> None:
    with pytest.raises(ConfigurationError, match="107 bytes"):
        await _bind(make_rig().addresses | {"control": "ipc:///" + "x" * 107})


async def test_a_taken_port_is_named(make_rig: MakeRig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HostError, match=f"control channel cannot listen at {address}"):
            await _bind(make_rig().addresses | {"control": address})


async def test_a_channel_without_an_address_is_named() -> None:
    with pytest.raises(ConfigurationError, match="shell, stdin, hb, iopub"):
        await _bind({"control": "ipc://x"})


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_client_with_the_curve_key_is_served(make_rig: MakeRig, transport: str) -> None:
    rig = make_rig(transport=transport, curve=zmq.curve_keypair())
    rig.start()
    client = rig.client()
    assert run(client, "print(1 + 1)").stdout == "2\n"
    assert client.is_alive()


@pytest.mark.parametrize("channel", ["shell", "iopub", "hb"])
@pytest.mark.parametrize("server_key", [None, zmq.curve_keypair()[0]], ids=["none", "wrong"])
def test_a_client_without_the_curve_key_is_not_let_in(
    make_rig: MakeRig, channel: str, server_key: bytes | None
) -> None:
    rig = make_rig(transport="tcp", curve=zmq.curve_keypair())
    with zmq.Context() as context, context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER) as stranger:
        stranger.linger = 0
        if server_key is not None:
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
            stranger.curve_serverkey = server_key
        monitor = stranger.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        stranger.connect(rig.addresses[channel])
        assert monitor.poll(READY * 1000)
        assert int(recv_monitor_message(monitor)["event"]) & FAILED
        stranger.disable_monitor()
        monitor.close()
