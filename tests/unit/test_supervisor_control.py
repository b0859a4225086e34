"""The lines between client and supervisor."""

from __future__ import annotations

import pytest

from sandbox_kernel.errors import BootError, ConfigurationError, SandboxKernelError
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.control import (
    LaunchRequest,
    PrepareRequest,
    addresses,
    failure,
    from_line,
    raise_failure,
    to_line,
)

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}


def request(**changes: object) -> dict[str, object]:
    made = LaunchRequest("abc", VMSpec(memory=300), ("python3",), {"A": "1"}, {"key": "k"}, 77, 1.5)
    return from_line(made.to_line()) | changes


def test_a_launch_request_survives_its_line() -> None:
    parsed = LaunchRequest.from_message(request())
    assert parsed == LaunchRequest("abc", VMSpec(memory=300), ("python3",), {"A": "1"}, {"key": "k"}, 77, 1.5)


def test_what_an_administrator_allows_survives_its_line_and_cannot_be_left_out() -> None:
    made = LaunchRequest("abc", VMSpec(), ("python3",), {}, {"key": "k"}, mount_roots=("/a",), max_expose=0)
    message = from_line(made.to_line())
    assert LaunchRequest.from_message(message) == made
    for name in ("mount_roots", "max_expose"):
        with pytest.raises(ConfigurationError):
            LaunchRequest.from_message({key: message[key] for key in message if key != name})


def test_the_session_key_is_not_in_the_representation() -> None:
    assert "secret" not in repr(LaunchRequest("a", VMSpec(), ("x",), {}, {"key": "secret"}))


@pytest.mark.parametrize(
    "changes", [{"id": "../up"}, {"id": ""}, {"argv": []}, {"env": 3}, {"spec": {"x": 1}}]
)
def test_a_malformed_launch_request_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        LaunchRequest.from_message(request(**changes))


@pytest.mark.parametrize("asleep", [True, False])
def test_a_prepare_request_survives_its_line(asleep: bool) -> None:
    made = PrepareRequest("abc", VMSpec(memory=300), asleep, 77)
    assert PrepareRequest.from_message(from_line(made.to_line())) == made


@pytest.mark.parametrize("changes", [{"id": "../up"}, {"client": "x"}, {"client": None}, {"spec": {"x": 1}}])
def test_a_malformed_prepare_request_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        PrepareRequest.from_message(from_line(PrepareRequest("abc", VMSpec()).to_line()) | changes)


def test_addresses_follow_jupyters_convention() -> None:
    assert addresses({"transport": "ipc", "ip": "/run/x/k", **PORTS})["stdin"] == "ipc:///run/x/k-3"
    assert addresses({"transport": "tcp", "ip": "127.0.0.1", **PORTS})["hb"] == "tcp://127.0.0.1:5"


def test_an_ipc_path_too_long_for_a_socket_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigurationError) as caught:
        addresses({"transport": "ipc", "ip": "/" + "x" * 106, **PORTS})
    assert "longer than the 107 bytes" in str(caught.value)
    assert "point XDG_RUNTIME_DIR at a shorter directory" in str(caught.value)


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'inproc' is not known; allowed are ipc and tcp"):
        addresses({"transport": "inproc", "ip": "x", **PORTS})


def test_an_error_arrives_as_the_class_it_was() -> None:
    with pytest.raises(BootError, match="too late"):
        raise_failure(from_line(to_line(failure(BootError("too late")))))


def test_an_unknown_error_class_is_still_ours() -> None:
    with pytest.raises(SandboxKernelError, match="odd"):
        raise_failure({"ok": False, "error": "NoSuchClass", "message": "odd"})


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"\xff"])
def test_a_line_that_is_no_object_is_refused(line: bytes) -> None:
    with pytest.raises(ConfigurationError):
        from_line(line)
