"""Looking at VMs through the sockets in their folders."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import ConfigurationError, GuestError, HostError, MountError
from sandbox_kernel.supervisor import overview, remote
from sandbox_kernel.supervisor.window import SOCKET, Window


async def ask(folder: Path, line: bytes) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(folder / SOCKET)
    writer.write(line)
    answer: dict[str, Any] = json.loads(await asyncio.wait_for(reader.readline(), 5) or b"{}")
    writer.close()
    return answer


@pytest.fixture
async def window(tmp_path: Path) -> Any:
    async def look(request: Mapping[str, Any]) -> dict[str, Any]:
        return {"usage": {"id": tmp_path.name, "cpu": 1.5}}

    made = Window(tmp_path, {"usage": look})
    await made.open()
    yield tmp_path
    await made.aclose()


async def test_a_window_tells_the_usage(window: Path) -> None:
    assert await ask(window, b'{"op": "usage"}\n') == {"ok": True, "usage": {"id": window.name, "cpu": 1.5}}


@pytest.mark.parametrize("line", [b'{"op": "stop"}\n', b"x\n", b"[]\n"])
async def test_a_window_does_nothing_but_its_operations(window: Path, line: bytes) -> None:
    answer = await ask(window, line)
    assert answer["ok"] is False
    assert answer["message"].endswith(".")


async def test_a_line_without_end_is_not_waited_for(window: Path) -> None:
    assert await ask(window, b"x" * 200_000) == {}
    assert (await ask(window, b'{"op": "usage"}\n'))["ok"]


async def test_a_figure_that_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    async def look(request: Mapping[str, Any]) -> dict[str, Any]:
        raise GuestError("It is gone.")

    made = Window(tmp_path, {"usage": look})
    await made.open()
    assert await ask(tmp_path, b'{"op": "usage"}\n') == {
        "ok": False,
        "error": "GuestError",
        "message": "It is gone.",
    }
    await made.aclose()


async def test_where_no_socket_can_be_made_the_vm_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Window(tmp_path / "missing", {})
    await made.open()
    await made.aclose()
    assert "this VM can be seen by its client only" in caplog.text


def test_all_are_looked_at_and_one_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote.paths, "runtime_dir", lambda: tmp_path)
    monkeypatch.setattr(overview, "SECONDS", 0.3)
    answers = {"a": b'{"ok": true, "usage": {"id": "a"}}\n', "b": b"nonsense\n", "c": b""}
    listeners = []
    for name, answer in answers.items():
        (tmp_path / name).mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name / SOCKET))
        listener.listen()
        listeners.append(listener)

        def serve(listener: socket.socket = listener, answer: bytes = answer) -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            if answer:
                connection.sendall(answer)
            else:
                threading.Event().wait(2)

        threading.Thread(target=serve, daemon=True).start()
    (tmp_path / "d").mkdir()
    gone = socket.socket(socket.AF_UNIX)
    gone.bind(str(tmp_path / "d" / SOCKET))
    gone.close()
    found = overview.look_at_all()
    assert found[0] == {"id": "a"}
    assert [vm["id"] for vm in found[1:]] == ["b", "c"]
    assert all(vm["error"] for vm in found[1:])
    for listener in listeners:
        listener.close()


async def test_what_a_vm_has_against_a_request_is_raised_as_what_it_is(tmp_path: Path) -> None:
    async def mount(request: Mapping[str, Any]) -> dict[str, Any]:
        raise MountError(f"No {request['mount']}.")

    made = Window(tmp_path, {"mount": mount})
    await made.open()
    with pytest.raises(MountError, match=r"^No x\.$"):
        await asyncio.to_thread(remote.ask, tmp_path / SOCKET, {"op": "mount", "mount": "x"})
    await made.aclose()
    with pytest.raises(HostError, match="has ended"):
        remote.ask(tmp_path / "gone" / SOCKET, {"op": "mount"})


def test_a_vm_is_found_by_the_beginning_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote.paths, "runtime_dir", lambda: tmp_path)
    with pytest.raises(ConfigurationError, match="There is no VM"):
        remote.find("")
    for name in ("ab1", "ab2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SOCKET).touch()
    assert remote.find("ab2").parent.name == "ab2"
    with pytest.raises(ConfigurationError, match="more than one VM 'ab'…: ab1, ab2"):
        remote.find("ab")
