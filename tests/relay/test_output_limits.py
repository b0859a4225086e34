"""What a kernel publishes beyond its limits: left out with a word, or made to wait; the cell goes on."""

from __future__ import annotations

import time

from sandbox_kernel.death import Death
from sandbox_kernel.relay.limits import RelayLimits
from tests.relay import hostile
from tests.relay.conftest import MakeRig
from tests.relay.conversation import answer, ask, hear, is_stream, run
from tests.relay.hostile import jupyter
from tests.relay.rig import Rig

MIB = 1 << 20


def limited(make_rig: MakeRig, output: float = 0, size: float = 256, rate: float = 0) -> Rig:
    made = make_rig(limits=RelayLimits.of(output, size, rate))
    made.start()
    return made


def test_a_cell_that_puts_out_too_much_goes_on_and_the_next_one_is_heard(make_rig: MakeRig) -> None:
    client = limited(make_rig, output=1).client()
    heard = run(client, "for _ in range(300): print('x' * 10_000, flush=True)")
    own = [m for m in heard.of("stream") if m["content"]["name"] == "stdout"]
    assert 0.9 * MIB < sum(len(m["content"]["text"]) for m in own) <= MIB
    notices = [m["content"]["text"] for m in heard.of("stream") if m["content"]["name"] == "stderr"]
    assert len(notices) == 1
    assert "output limit of 1 MiB" in notices[0]
    assert run(client, "print('quiet')").stdout == "quiet\n"
    assert run(client, "6 * 7").shown == ["42"]


def test_a_message_that_is_too_large_is_left_out_with_a_word(make_rig: MakeRig) -> None:
    client = limited(make_rig, size=1).client()
    heard = run(
        client, "from IPython.display import display\ndisplay({'text/plain': 'x' * 3_000_000}, raw=True)"
    )
    assert heard.shown == []
    assert "message_size allows 1 MiB, so it was left out" in heard.stdout
    assert run(client, "6 * 7").shown == ["42"]


def test_a_reply_that_is_too_large_is_an_error_in_its_place(make_rig: MakeRig) -> None:
    client = limited(make_rig, size=1).client()
    request = client.execute("", user_expressions={"large": "'x' * 3_000_000"})
    reply = answer(client, request)
    assert reply["msg_type"] == "execute_reply"
    assert reply["content"]["ename"] == "MessageSizeLimitExceeded"
    hear(client, request)
    assert run(client, "6 * 7").shown == ["42"]


def test_a_kernel_that_publishes_too_fast_waits_and_loses_nothing(make_rig: MakeRig) -> None:
    client = limited(make_rig, rate=200).client()
    code = (
        "from IPython.display import display\nfor i in range(900): display({'text/plain': str(i)}, raw=True)"
    )
    began = time.monotonic()
    heard = run(client, code)
    assert heard.shown == [str(i) for i in range(900)]
    # 200 at once, some that were read together, and the others at 200 a second.
    assert time.monotonic() - began > 2


def test_a_reply_with_a_wrong_signature_answers_nothing(make_rig: MakeRig) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    request = client.execute("1")
    with hostile.guest(
        rig, "shell", hostile.speak(jupyter(b"whoever", kind="execute_reply", parent=request))
    ):
        rig.attach()
        rig.wait_until(lambda: rig.relay.unanswered == 1)
        time.sleep(0.2)
        assert len(rig.thread.call(lambda: rig.relay.running)) == 1


def test_a_kernel_in_a_dead_ones_place_says_so_in_its_first_cell(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.relay.notice = "The kernel was started anew."
    rig.start()
    client = rig.client()
    heard = run(client, "print('hello')")
    assert heard.kinds.index("execute_input") < heard.kinds.index("stream")
    first = heard.of("stream")[0]["content"]
    assert first == {"name": "stderr", "text": "[sandbox-kernel] The kernel was started anew.\n"}
    assert run(client, "print('hello')").stdout == "hello\n"


def test_only_cells_are_counted_as_cells(running: Rig) -> None:
    client = running.client()
    before = running.relay.cells
    answer(client, ask(client, "kernel_info_request", "control"), "control")
    answer(client, client.complete("pri"))
    assert running.relay.cells == before
    run(client, "1")
    assert running.relay.cells == before + 1


def test_the_death_of_a_kernel_that_was_heard_too_much_of_is_told(make_rig: MakeRig) -> None:
    rig = limited(make_rig, output=0.1)
    client = rig.client()
    cell = client.execute("while True: print('x' * 1000, flush=True)")
    hear(client, cell, until=lambda m: is_stream(m) and m["content"]["name"] == "stderr")
    rig.kill_kernel()
    rig.thread.run(rig.relay.report_death(Death("KernelCrashed", "It crashed.")))
    assert hear(client, cell).kinds[-2:] == ["error", "status"]
