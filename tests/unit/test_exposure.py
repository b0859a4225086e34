"""What an exposed port is written as, and how many a VM may have."""

from __future__ import annotations

import pytest

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.exposure import Exposure, check, fill_in, parse
from sandbox_kernel.spec import VMSpec, max_expose, placed, resolve

WHERE = {"cwd": "/work/here", "notebook_dir": "/work/there"}


@pytest.mark.parametrize(
    ("text", "exposure", "address"),
    [
        ("8888", Exposure(8888, 0), "127.0.0.1:0"),
        ("8888:0", Exposure(8888, 0), "127.0.0.1:0"),
        ("8888:9000", Exposure(8888, 9000), "127.0.0.1:9000"),
        ("1:65535", Exposure(1, 65535), "127.0.0.1:65535"),
        ("8888:/a:b/c.sock", Exposure(8888, None, "/a:b/c.sock"), "/a:b/c.sock"),
    ],
)
def test_what_is_written_is_what_is_exposed(text: str, exposure: Exposure, address: str) -> None:
    assert parse(text) == exposure
    assert parse(str(exposure)) == exposure
    assert exposure.address == address
    assert exposure.to_dict() == {"port": exposure.guest, "address": address}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http",
        "8888:",
        "8888:x",
        "8888:localhost:9000",
        "0.0.0.0:8888",
        "8888:{cwd}/s",
        "+1",
        "8888:9\n",
        "1:/a\nb",
        "1:/\ud800",
    ],
)
def test_what_is_no_port_is_refused_with_what_one_looks_like(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"{text!r} exposes no port; write GUEST, GUEST:PORT or GUEST:/SOCKET, such as 8888:9000."
    )


@pytest.mark.parametrize("text", ["0", "65536", "8888:65536", "99999:1"])
def test_a_port_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"{text!r} names a port that there is not; those of the guest are 1 to 65535, those of the host 0 "
        "(any) to 65535."
    )


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse("80:/" + "é" * 60)
    assert str(caught.value) == (
        f"The socket /{'é' * 60}… for port 80 has a path of over 107 bytes, which is the most; choose a "
        "shorter one."
    )


def test_places_are_filled_in_where_a_path_begins() -> None:
    assert fill_in(("1", "2:{cwd}/a", "3:{notebook_dir}/{cwd}"), WHERE) == (
        "1",
        "2:/work/here/a",
        "3:/work/there/{cwd}",
    )


def test_an_administrator_says_how_many() -> None:
    two = [Exposure(1), Exposure(2)]
    check(two, None)
    check(two, 2)
    check([], 0)
    with pytest.raises(ConfigurationError) as caught:
        check(two, 1)
    assert str(caught.value) == (
        "Ports to be exposed: 2, over the administrator's limit max_expose = 1; expose 1 or fewer."
    )
    with pytest.raises(ConfigurationError) as caught:
        check(two, 0)
    assert str(caught.value).endswith("max_expose = 0; expose none.")


def test_there_is_a_most_without_an_administrator() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check([Exposure(1)] * 17, 1000)
    assert str(caught.value) == "A VM has at most 16 exposed ports; take one away first."


def test_two_ports_do_not_share_an_address_and_one_may_have_two() -> None:
    check([Exposure(1), Exposure(1), Exposure(1, 5), Exposure(1, None, "/s")], None)
    for address in (Exposure(1, 9000), Exposure(1, None, "/s")):
        with pytest.raises(ConfigurationError) as caught:
            check([address, address], None)
        assert str(caught.value) == (
            f"Two ports are to be exposed at {address.address}; give each an address of its own."
        )


def test_the_key_takes_what_can_be_parsed() -> None:
    spec = resolve([("x", {"expose": ["8888", "80:9000", "81:{cwd}/s"]})])
    assert placed(spec, WHERE, None, 3).expose == ("8888", "80:9000", "81:/work/here/s")
    assert spec.shape == VMSpec()
    with pytest.raises(ConfigurationError) as caught:
        resolve([("x", {"expose": ["0.0.0.0:80"]})])
    assert str(caught.value) == (
        "x sets expose to ['0.0.0.0:80']; allowed is a list of GUEST, GUEST:PORT or GUEST:/SOCKET, where a "
        "path begins with `/` or {cwd}."
    )
    with pytest.raises(ConfigurationError, match="max_expose = 2; expose 2 or fewer"):
        placed(spec, WHERE, None, 2)


def test_the_administrators_number_comes_from_traits_or_else_the_environment() -> None:
    assert max_expose({}, None) is None
    assert max_expose({"SANDBOX_KERNEL_MAX_EXPOSE": "3"}, None) == 3
    assert max_expose({"SANDBOX_KERNEL_MAX_EXPOSE": "3"}, 0) == 0
    for environment, configured, shown in (
        ({"SANDBOX_KERNEL_MAX_EXPOSE": "no"}, None, "'no'"),
        ({"SANDBOX_KERNEL_MAX_EXPOSE": ""}, None, "''"),
        ({}, -1, "-1"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            max_expose(environment, configured)
        assert str(caught.value) == f"max_expose is {shown}; allowed is a whole number, 0 to expose none."
