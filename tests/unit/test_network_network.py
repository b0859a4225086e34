"""A VM's network without the VM: made, changed, ended, and gone whatever becomes of whoever made it."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from network_inside import Inside, need

from sandbox_kernel.network.addresses import GATEWAY_MAC, GUEST_MAC, V4

ORDINARY = ["unshare", "--user", "--map-user=1500", "--map-group=1500", "--"]
"""One who has no capability, and no file of anybody else's."""
OWNER = Path(__file__).with_name("network_owner.py")
BEGIN = "[found.begin(), await found.tap() >= 0, await found._opening][1]"
ENDED = (
    "The kernel's network has ended (the {}'s process ended with status -9); "
    "restart the kernel to have it again."
)


class Owner:
    """The program that has a network."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def do(self, expression: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(expression, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return json.loads(line)

    def open(self, *rules: str) -> dict[str, int]:
        """With a policy; the processes by their names."""
        assert self.do(BEGIN) is True
        assert self.do(f"await found.apply(policy('allowlist', {list(rules)!r}))") is None
        return self.parts()

    def parts(self) -> dict[str, int]:
        return {name: int(pid) for pid, name in self.do("descendants()").items()}


@contextmanager
def owning(folder: Path, words: list[str]) -> Iterator[Owner]:
    folder.chmod(0o777)
    with subprocess.Popen(
        [*words, sys.executable, str(OWNER), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Owner(process)
        finally:
            process.kill()


@pytest.fixture(params=["as whoever tests", "without a capability"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Owner]:
    need("nft", "dnsmasq", "slirp4netns", "bwrap", "unshare")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/net/tun")
    with owning(tmp_path, ORDINARY if request.param == "without a capability" else []) as made:
        yield made


def in_time(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(to: str, protocol: int, segment: bytes, sender: str = V4.guest) -> str:
    """What a guest's device sends, as Python text: no offloads, Ethernet, IPv4."""
    addresses = socket.inet_aton(sender) + socket.inet_aton(to)
    pseudo = addresses + struct.pack(">BBH", 0, protocol, len(segment))
    at = 16 if protocol == 6 else 6
    segment = segment[:at] + struct.pack(">H", checksum(pseudo + segment)) + segment[at + 2 :]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, protocol, 0)
    head = head[:10] + struct.pack(">H", checksum(head + addresses)) + addresses
    ether = bytes.fromhex((GATEWAY_MAC + GUEST_MAC).replace(":", "")) + b"\x08\x00"
    return repr(bytes(10) + ether + head + segment)


def syn(to: str, port: int, sender: str = V4.guest) -> str:
    return frame(to, 6, struct.pack(">HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 1000, 0, 0), sender)


def question(name: str) -> str:
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    asked = struct.pack(">HHHHHH", 7, 256, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, 1, 1)
    return frame(V4.gateway, 17, struct.pack(">HHHH", 40000, 53, 8 + len(asked), 0) + asked)


def send(owner: Owner, text: str) -> None:
    assert owner.do(f"os.write(found._namespace.tap, {text})") > 0


def test_a_network_is_made_changed_counted_and_ended(owner: Owner) -> None:
    parts = owner.open("x.org", "*.y.org:443", "10.0.0.0/8")
    assert set(parts) >= {"dnsmasq", "slirp4netns", "bwrap"}
    before = owner.do("await found.counters()")
    send(owner, question("evil.example"))
    assert owner.do("await seen('refused evil.example: no rule allows this name')")
    answer = owner.do("len(os.read(found._namespace.tap, 4096))")
    received, sent = owner.do("await found.counters()")
    assert received >= before[0] + answer - 10
    assert sent >= before[1] + 14 + 20 + 8 + 30
    assert owner.do("await found.apply(policy('public', (), ['10.0.0.0/8'], (), 9, 1.0))") is None
    later = owner.parts()
    assert later["dnsmasq"] != parts["dnsmasq"]
    assert later["slirp4netns"] == parts["slirp4netns"]
    assert in_time(lambda: gone(parts["dnsmasq"]))
    assert owner.do("await found.aclose()") is None
    assert in_time(lambda: all(map(gone, (*parts.values(), *later.values()))))
    assert owner.do("descendants()") == {}
    assert [each for each in owner.do("told") if each.startswith("trouble")] == []
    assert owner.do("await found.aclose()") is None


def test_before_somebody_decides_nothing_passes(owner: Owner) -> None:
    assert owner.do(BEGIN) is True
    send(owner, syn("93.184.216.34", 443))
    assert owner.do("await seen('refused 93.184.216.34:443 (tcp): no rule allows it')")


def test_what_is_refused_is_told_with_its_reason(owner: Owner) -> None:
    owner.open("x.org")
    for text, words in (
        (syn("93.184.216.34", 443), "93.184.216.34:443 (tcp): no rule allows it"),
        (syn(V4.host, 22), f"{V4.host}:22 (tcp): nothing of the host is to be reached there"),
        (syn(V4.gateway, 22), f"{V4.gateway}:22 (tcp): nothing of the host is to be reached there"),
        (syn("8.8.8.8", 53), "8.8.8.8:53 (tcp): the only DNS server is the one in /etc/resolv.conf"),
        (syn("10.1.2.3", 80), "10.1.2.3:80 (tcp): the address is private, or special"),
        (syn("1.1.1.1", 80, "198.18.0.3"), "1.1.1.1:80 (tcp): it did not come from the guest's own address"),
    ):
        send(owner, text)
        assert owner.do(f"await seen({words!r})"), (words, owner.do("told"))
    owner.do("await found.apply(policy('full', (), ['93.0.0.0/8']))")
    send(owner, syn("93.184.216.35", 443))
    assert owner.do("await seen('93.184.216.35:443 (tcp): `network_deny` has 93.0.0.0/8')")


def asked(name: str, address: str) -> str:
    """As if the resolver had told an address to the guest."""
    said = f"found._note(resolver.Said(7, 'asked', {name!r}))"
    return f"[{said}, found._note(resolver.Said(7, 'answered', {name!r}, {address!r}))]"


def test_an_address_that_is_told_again_lives_on_under_the_policy_that_has_its_name(owner: Owner) -> None:
    parts = owner.open("x.org", "y.org")
    holder = owner.do("found._namespace._outset.holder.process.pid")
    assert holder in parts.values()  # or its parent, in the same network
    place = Inside(holder)
    for address in ("1.2.3.4", "1.2.3.5"):
        owner.do(asked("x.org", address))
    assert in_time(lambda: place.addresses("n0v4g2") == {"1.2.3.4", "1.2.3.5"})
    assert place.addresses("n1v4g2") == set()
    # What was told under the policy before is nothing to the one that takes its place.
    owner.do(f"[{asked('x.org', '1.2.3.6')}, await found.apply(policy('allowlist', ['z.org']))]")
    owner.do(asked("z.org", "1.2.3.7"))
    assert in_time(lambda: place.addresses("n0v4g3") == {"1.2.3.7"})


def test_what_has_been_done_is_not_kept(owner: Owner) -> None:
    owner.open("*.x.org")
    for number in range(3):
        owner.do(asked(f"n{number}.x.org", f"1.2.3.{number}"))
        assert in_time(lambda: not owner.do("bool(found._stale)"))
    assert in_time(lambda: owner.do("len(found._tasks)") == 1)
    assert owner.do("len(found._stack._exit_callbacks)") < 10


def test_who_gives_up_waiting_does_not_get_the_next_ones_answer(owner: Owner) -> None:
    owner.open("x.org")
    assert owner.do("(tasks := [asyncio.create_task(found.counters()) for _ in range(3)]) and None") is None
    assert owner.do("await asyncio.sleep(0)") is None
    owner.do("[each.cancel() for each in tasks]")
    assert owner.do("await found.apply(policy('allowlist', ['y.org']))") is None
    assert len(owner.do("await found.counters()")) == 2
    send(owner, question("x.org"))
    assert owner.do("await seen('refused x.org')")


def test_when_its_owner_is_killed_nothing_is_left(owner: Owner) -> None:
    parts = owner.open("x.org")
    pids = [*parts.values(), owner.do("os.getpid()")]
    os.kill(owner.do("os.getpid()"), signal.SIGKILL)
    assert in_time(lambda: all(map(gone, pids))), [pid for pid in pids if not gone(pid)]


def test_an_owner_that_is_killed_at_any_time_leaves_nothing(tmp_path: Path) -> None:
    for delay in (0.05, 0.2, 0.4):
        with owning(tmp_path, []) as owner:
            owner.do("found.begin()")
            owner.do(f"await asyncio.sleep({delay})")
            pids = [int(pid) for pid in owner.do("descendants()")]
            owner.process.kill()
            assert in_time(lambda pids=pids: all(map(gone, pids)))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("slirp4netns", ENDED.format("uplink")),
        ("holder", ENDED.format("namespace")),
        (
            "dnsmasq",
            "The kernel's DNS server has ended, so that no name is found any more; restart the kernel.",
        ),
    ],
)
def test_a_part_that_is_killed_is_told_in_a_sentence(owner: Owner, part: str, words: str) -> None:
    parts = owner.open("x.org")
    os.kill(
        owner.do("found._namespace._outset.holder.process.pid") if part == "holder" else parts[part],
        signal.SIGKILL,
    )
    assert owner.do(f"await seen({'trouble: ' + words!r})"), owner.do("told")
    if part == "holder":
        said = owner.do("await found.counters()")
        assert said.startswith("NetworkError: The VM's network namespace has ended (")
    assert owner.do("await found.aclose()") is None
    assert in_time(lambda: all(map(gone, parts.values()))), [n for n, pid in parts.items() if not gone(pid)]


def without(tmp_path: Path, hide: str) -> list[str]:
    """Words by which a program sees a host that has something not."""
    need("unshare", "mount")
    script = f'{hide} && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-ec", script, "sh"]


def test_a_host_without_taps_says_what_is_missing(tmp_path: Path) -> None:
    with owning(tmp_path, without(tmp_path, "mount -t tmpfs none /dev/net")) as owner:
        assert owner.do(BEGIN) == (
            "NetworkError: The VM's network cannot be had on this host (/dev/net/tun: No such file or "
            "directory); run `sandbox-kernel doctor` and look at namespaces, /dev/net/tun and nftables."
        )
        assert owner.do("await found.aclose()") is None
        assert owner.do("descendants()") == {}


@pytest.mark.parametrize(
    ("program", "package"), [("nft", "nftables"), ("slirp4netns", "slirp4netns"), ("bwrap", "bubblewrap")]
)
def test_a_host_without_a_program_says_which_package_has_it(
    tmp_path: Path, program: str, package: str
) -> None:
    need(program)
    hide = f"mount --bind /dev/null $(readlink -f $(command -v {program}))"
    with owning(tmp_path, without(tmp_path, hide)) as owner:
        assert owner.do(BEGIN) == (
            f"MissingToolError: {program} is not installed; install the package {package} or take "
            "`network` out of the configuration."
        )
        assert owner.do("await found.aclose()") is None


def test_without_a_dns_server_the_policy_before_stays_in_force(tmp_path: Path) -> None:
    need("dnsmasq", "nft", "slirp4netns", "bwrap")
    hide = "mount --bind /dev/null $(readlink -f $(command -v dnsmasq))"
    with owning(tmp_path, without(tmp_path, hide)) as owner:
        assert owner.do(BEGIN) is True
        assert owner.do("await found.apply(policy('full'))") == (
            "MissingToolError: dnsmasq is not installed; install the package dnsmasq-base or do "
            "without `network`."
        )
        assert owner.do("found.policy.mode") == "allowlist"


def test_a_dns_server_that_does_not_start_is_told_with_its_words(tmp_path: Path) -> None:
    need("dnsmasq", "nft", "slirp4netns", "bwrap")
    false = "mount --bind $(readlink -f $(command -v ls)) $(readlink -f $(command -v dnsmasq))"
    with owning(tmp_path, without(tmp_path, false)) as owner:
        assert owner.do(BEGIN) is True
        said = owner.do("await found.apply(policy('allowlist'))")
        assert said.startswith("NetworkError: The kernel's DNS server does not start (")
        assert said.endswith("); look at the supervisor's log.")
        assert "unrecognized option" in said
        assert owner.do("await found.aclose()") is None
        assert owner.do("descendants()") == {}


def test_who_waits_for_a_dns_server_does_not_wait_for_one_that_was_ended(owner: Owner) -> None:
    owner.open("x.org")
    assert owner.do("(task := asyncio.create_task(found.apply(policy('public')))) and None") is None
    assert owner.do("await found.aclose()") is None
    assert owner.do("[await asyncio.wait([task], timeout=5), task.done()][1]")
    assert "The kernel's network has ended meanwhile" in owner.do("repr(task.exception())")


def running(marker: str) -> list[str]:
    """Processes that have a word on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in file.read_bytes():
                found.append(file.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("delay", [0.005, 0.01, 0.015, 0.02, 0.03, 0.05])
def test_a_dns_server_that_is_starting_when_the_namespace_ends_does_not_stay(
    tmp_path: Path, delay: float
) -> None:
    need("dnsmasq", "nft", "slirp4netns", "bwrap")
    marker = f"m{os.getpid()}-{delay}.example"
    with owning(tmp_path, []) as owner:
        assert owner.do(BEGIN) is True
        holder = owner.do("found._namespace._outset.holder.process.pid")
        owner.do(f"(task := asyncio.create_task(found.apply(policy('allowlist', ['{marker}'])))) and None")
        assert owner.do("await asyncio.sleep(0)") is None
        time.sleep(delay)
        os.kill(holder, signal.SIGKILL)
        owner.do("[await asyncio.wait([task], timeout=20), 0][1]")
        assert in_time(lambda: running(marker) == [])
