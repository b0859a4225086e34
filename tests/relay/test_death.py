"""When the guest is gone, everybody who waits for an answer is told why, in signed messages."""

from __future__ import annotations

import dataclasses

from sandbox_kernel.death import Death
from tests.relay.conftest import MakeRig
from tests.relay.conversation import answer, hear, is_stream, run
from tests.relay.rig import Rig

REASON = "memory limit 512 MiB reached; raise `memory` in the kernelspec."
DEATH = Death("MemoryLimitExceeded", REASON, limit=512, peak=510.5, unit="MiB", uptime=3)


def test_the_running_cell_gets_the_reason_and_the_queued_ones_are_aborted(running: Rig) -> None:
    client = running.client()
    run(client, "1 + 1")
    cells = [client.execute("print('last words', flush=True)\nwhile True: pass")]
    hear(client, cells[0], until=is_stream)
    cells += [client.execute("2"), client.execute("3")]
    running.wait_until(lambda: running.relay.unanswered == 3)
    running.kill_kernel()
    running.thread.run(running.relay.report_death(DEATH))
    reply = answer(client, cells[0])
    assert reply["msg_type"] == "execute_reply"
    content = reply["content"]
    assert (content["status"], content["ename"], content["evalue"]) == ("error", DEATH.name, REASON)
    assert content["execution_count"] == 2
    record = reply["metadata"]["sandbox_kernel"]
    assert (record["limit"], record["peak"], record["unit"]) == (512, 510.5, "MiB")
    assert record["cell_seconds"] > 0
    [error] = hear(client, cells[0]).of("error")
    assert error["metadata"] == reply["metadata"]
    first, figures = error["content"]["traceback"]
    assert first == f"MemoryLimitExceeded: {REASON}"
    assert figures.startswith("limit 512 MiB, peak 510.5 MiB, cell ")
    for cell in cells[1:]:
        assert answer(client, cell)["content"]["status"] == "aborted"
        heard = hear(client, cell)
        assert heard.kinds == ["status"]
        assert heard.messages[-1]["parent_header"]["session"] == client.session.session


def test_output_before_the_death_comes_before_the_report(running: Rig) -> None:
    client = running.client()
    cell = client.execute("import os\nfor i in range(500): print(i, flush=True)\nos._exit(1)")
    assert running.kernel is not None
    running.kernel.wait()
    running.thread.run(running.relay.report_death(DEATH))
    heard = hear(client, cell)
    assert heard.kinds[-2:] == ["error", "status"]
    printed = heard.stdout.split()
    assert printed == [str(i) for i in range(len(printed))]


def test_each_client_gets_its_own_answer(running: Rig) -> None:
    first, second = running.client(), running.client()
    cell = first.execute("print('running', flush=True)\nwhile True: pass")
    hear(first, cell, until=is_stream)
    question = second.complete("pri")
    running.wait_until(lambda: running.relay.unanswered == 2)
    running.kill_kernel()
    running.thread.run(running.relay.report_death(DEATH))
    assert answer(second, question)["msg_type"] == "complete_reply"
    assert answer(first, cell)["msg_type"] == "execute_reply"
    assert not first.shell_channel.msg_ready()
    assert not second.shell_channel.msg_ready()


def test_what_is_no_cell_gets_a_reply_and_no_error_output(running: Rig) -> None:
    client = running.client()
    cell = client.execute("print('running', flush=True)\nwhile True: pass")
    hear(client, cell, until=is_stream)
    question = client.complete("pri")
    running.wait_until(lambda: running.relay.unanswered == 2)
    running.kill_kernel()
    running.thread.run(running.relay.report_death(DEATH))
    assert answer(client, question)["content"]["evalue"] == REASON
    assert hear(client, question).kinds == ["status"]


def test_a_cell_that_ended_its_kernel_shows_why_and_gets_no_reply(running: Rig) -> None:
    client = running.client()
    cell = client.execute("print('running', flush=True)\nwhile True: pass")
    hear(client, cell, until=is_stream)
    question = client.complete("pri")
    running.wait_until(lambda: running.relay.unanswered == 2)
    running.kill_kernel()
    running.thread.run(running.relay.report_death(dataclasses.replace(DEATH, by_user_code=True)))
    assert hear(client, cell).kinds == ["error", "status"]
    # The question was asked after the cell: a reply to the cell would have come first.
    assert client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] == question


def test_answered_requests_are_not_answered_again(running: Rig) -> None:
    client = running.client()
    run(client, "1")
    running.kill_kernel()
    running.thread.run(running.relay.report_death(DEATH))
    # What is sent now is the first thing that comes after all reports.
    watcher = running.client(ready=False)
    watcher.get_iopub_msg(timeout=30)
    assert not client.shell_channel.msg_ready()


def test_a_guest_that_never_came_up_is_reported_to_who_asked(make_rig: MakeRig) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    request = client.execute("1")
    rig.thread.run(rig.relay.report_death(DEATH))
    while not client.shell_channel.msg_ready():
        # The request was not there yet.
        rig.thread.run(rig.relay.report_death(DEATH))
    assert answer(client, request)["content"]["evalue"] == REASON


def test_the_report_reaches_clients_although_the_relay_closes_at_once(running: Rig) -> None:
    client = running.client()
    cell = client.execute("print('running', flush=True)\nwhile True: pass")
    hear(client, cell, until=is_stream)
    running.kill_kernel()
    running.thread.run(running.relay.report_death(DEATH))
    running.thread.run(running.relay.aclose())
    assert answer(client, cell)["content"]["evalue"] == REASON
    assert hear(client, cell).kinds == ["error", "status"]
