"""A stock ipykernel behind the relay behaves for its clients as it does without."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import zmq
from jupyter_client import BlockingKernelClient

from sandbox_kernel.death import Death
from tests.relay.conftest import MakeRig
from tests.relay.conversation import answer, ask, hear, is_stream, run
from tests.relay.rig import READY, Rig

MEGABYTE = 1_000_000


def test_outputs_come_in_order(running: Rig) -> None:
    heard = run(running.client(), "print('one'); display('two'); print('three'); 4")
    assert heard.kinds == [
        "status",
        "execute_input",
        "stream",
        "display_data",
        "stream",
        "execute_result",
        "status",
    ]


def test_input_goes_to_the_client_that_runs_the_cell(running: Rig) -> None:
    clients = [running.client(), running.client()]
    for asking, other in (clients, clients[::-1]):
        request = asking.execute("print('hello', input('who? '))", allow_stdin=True)
        question = asking.get_stdin_msg(timeout=READY)
        assert question["content"]["prompt"] == "who? "
        assert not other.stdin_channel.msg_ready()
        asking.input(asking.session.session)
        assert hear(asking, request).stdout == f"hello {asking.session.session}\n"


def test_cells_of_two_clients_that_wait_for_input_get_their_own(running: Rig) -> None:
    clients = [running.client(), running.client()]
    requests = []
    for client in clients:
        requests.append(client.execute("print(input())", allow_stdin=True))
        if client is clients[0]:
            hear(client, requests[0], until=lambda message: message["msg_type"] == "execute_input")
    for client, request in zip(clients, requests, strict=True):
        client.get_stdin_msg(timeout=READY)
        client.input(request)
        assert hear(client, request).stdout == f"{request}\n"


def test_control_answers_while_shell_is_busy(running: Rig) -> None:
    client, gate = running.client(), running.folder / "gate"
    cell = client.execute(
        f"import os, time\nprint(1, flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(.01)"
    )
    hear(client, cell, until=is_stream)
    assert (
        answer(client, ask(client, "kernel_info_request", "control"), "control")["content"]["status"] == "ok"
    )
    gate.touch()
    assert answer(client, cell)["content"]["status"] == "ok"


def test_control_answers_while_iopub_floods(running: Rig) -> None:
    client = running.client()
    cell = client.execute("while True: print('x' * 1000, flush=True)")
    hear(client, cell, until=is_stream)
    for _ in range(5):
        request = ask(client, "kernel_info_request", "control")
        assert answer(client, request, "control")["content"]["status"] == "ok"
    assert running.kernel is not None
    os.kill(running.kernel.pid, signal.SIGINT)
    assert answer(client, cell)["content"]["ename"] == "KeyboardInterrupt"


def test_a_comm_carries_data_and_buffers_both_ways(running: Rig) -> None:
    client = running.client()
    run(
        client,
        "import comm\n"
        "def opened(comm, message):\n"
        "    comm.send({'got': message['content']['data']}, buffers=message['buffers'] * 2)\n"
        "comm.get_comm_manager().register_target('echo', opened)",
    )
    buffer = os.urandom(300_000)
    message = client.session.msg("comm_open", {"comm_id": "c", "target_name": "echo", "data": {"a": 1}})
    client.session.send(client.shell_channel.socket, message, buffers=[buffer])
    (echo,) = hear(client, message["header"]["msg_id"]).of("comm_msg")
    assert echo["content"]["data"] == {"got": {"a": 1}}
    assert [bytes(each) for each in echo["buffers"]] == [buffer, buffer]


def test_20_megabytes_of_stdout_are_complete(running: Rig) -> None:
    heard = run(running.client(), "for i in range(20_000): print(f'{i:0999}')")
    assert heard.stdout.split() == [f"{i:0999}" for i in range(20_000)]


def test_2000_messages_of_stdout_are_complete_and_in_order(running: Rig) -> None:
    heard = run(running.client(), "for i in range(2_000): print(f'{i:0999}', flush=True)")
    assert heard.stdout.split() == [f"{i:0999}" for i in range(2_000)]


def test_a_display_of_20_megabytes_is_complete(running: Rig) -> None:
    code = "display({'text/plain': 'abcdefghij' * 2_000_000}, raw=True)"
    assert run(running.client(), code).shown == ["abcdefghij" * 2 * MEGABYTE]


def test_a_cell_of_20_megabytes_arrives(running: Rig) -> None:
    assert run(running.client(), f"len('{'x' * 20 * MEGABYTE}')").shown == [str(20 * MEGABYTE)]


def test_a_second_client_hears_what_the_first_runs(running: Rig) -> None:
    first = running.client()
    run(first, "x = 42")
    second = running.client()
    request = first.execute("print(x)")
    assert hear(second, request).stdout == hear(first, request).stdout == "42\n"


def test_a_client_that_reconnects_with_its_identity_goes_on(running: Rig) -> None:
    first = running.client()
    run(first, "x = 42")
    session = first.session
    first.stop_channels()
    again = BlockingKernelClient(session=session)
    again.load_connection_info(running.info)
    again.start_channels()
    again.wait_for_ready(timeout=READY)
    assert run(again, "x").shown == ["42"]
    again.stop_channels()


def beats(rig: Rig, ping: bytes, patience: float = READY) -> bool:
    """Whether a heartbeat comes back as it was sent."""
    with zmq.Context() as context, context.socket(zmq.REQ) as beat:
        beat.linger = 0
        beat.connect(rig.addresses["hb"])
        beat.send(ping)
        return bool(beat.poll(patience * 1000)) and beat.recv() == ping


def test_the_heart_beats_before_the_guest_is_up_and_stops_when_it_is_known_to_be_dead(
    make_rig: MakeRig,
) -> None:
    rig = make_rig()
    assert all(beats(rig, ping) for ping in (b"ping", b"", bytes(1000)))
    rig.start()
    assert beats(rig, b"ping")
    rig.kill_kernel()
    rig.thread.run(rig.relay.report_death(Death("VMMDied", "It died.")))
    assert not beats(rig, b"ping", patience=0.3)


def test_tcp_works_like_ipc(make_rig: MakeRig) -> None:
    rig = make_rig(transport="tcp")
    rig.start()
    assert run(rig.client(), "print(1 + 1)").stdout == "2\n"


def test_requests_sent_before_the_guest_is_up_are_all_answered(make_rig: MakeRig) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    requests = [client.kernel_info(), *(client.execute(f"print({i})") for i in range(100))]
    rig.start()
    assert [answer(client, request)["content"]["status"] for request in requests] == ["ok"] * 101
    assert [hear(client, request).stdout for request in requests[1:]] == [f"{i}\n" for i in range(100)]


def test_the_last_words_of_a_kernel_that_shuts_down_arrive(running: Rig) -> None:
    client = running.client()
    client.execute("import atexit, sys")
    request = client.shutdown()
    assert running.kernel is not None
    assert running.kernel.wait(READY) == 0
    running.thread.run(running.relay.drain(READY))
    assert answer(client, request, "control")["content"]["status"] == "ok"
    assert running.relay.shutdown_requested
    assert not running.relay.failed.done()


def test_attaching_can_be_cancelled_and_tried_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    client = rig.client(ready=False)

    async def impatient() -> None:
        import asyncio

        async with asyncio.timeout(0):
            await rig.relay.attach(rig.dial)

    with pytest.raises(TimeoutError):
        rig.thread.run(impatient())
    request = client.kernel_info()
    rig.start()
    assert answer(client, request)["content"]["status"] == "ok"


def test_closing_twice_leaves_no_socket(make_rig: MakeRig) -> None:
    rig = make_rig()
    for _ in range(2):
        rig.thread.run(rig.relay.aclose())
    assert list(Path(rig.folder).iterdir()) == []
