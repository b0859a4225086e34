"""The network of one VM from its making to its end: namespace, policy in force, resolver, what is refused."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import NetworkError
from sandbox_kernel.jail.bubblewrap import confined_within, find
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.network import nflog, resolver
from sandbox_kernel.network.addresses import GUEST_MAC
from sandbox_kernel.network.namespace import Namespace
from sandbox_kernel.network.outset import Outset
from sandbox_kernel.network.own_addresses import own_addresses
from sandbox_kernel.network.refusals import Refusals
from sandbox_kernel.network.ruleset import refresh, ruleset
from sandbox_kernel.policy import Policy

log = logging.getLogger(__name__)

_CLOSED = Policy("allowlist")
"""What is in force until somebody decides: nothing passes."""
_PIECE = 65536
_LONGEST_LINE = 4096
_WORDS = 200
_DATAGRAMS = 32
"""Of netlink's log that are taken at a time."""
_REMEMBERED = 4096
"""Questions, and addresses with their names."""
_YOUNG = 20.0
"""Seconds for which an address in a set needs no new life."""
_TOGETHER = 0.2
"""Seconds in which addresses are collected that need one."""
_PATIENCE = 10.0
"""Seconds for the resolver to start."""
_MEMORY = 128 << 20
"""Bytes that the resolver may allocate."""


class Network:
    """One VM's network; `begin` it once, `aclose` it always."""

    def __init__(self, cgroup: Cgroup, logs: Path, host_loopback: bool, outset: Outset | None = None) -> None:
        """Nothing, or what has been begun.

        Args:
            cgroup: joined by all that is started.
            logs: folder of the VM's logs.
            host_loopback: whether there will be services of the host.
            outset: its holder; None to start one.
        """
        self._namespace = Namespace(cgroup, host_loopback, outset)
        self._stack = AsyncExitStack()
        self._stack.push_async_callback(self._namespace.aclose)
        self._refusals = Refusals(logs)
        self._stack.callback(self._refusals.close)
        self._stack.callback(self._hang_up)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack.push_async_callback(self._end_tasks)
        self._trouble: Callable[[str], None] = log.warning
        self._generations = itertools.count(1)
        self._generation = 0
        self._changing = asyncio.Lock()
        self._linking: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._log_of_resolver = -1
        self._rest = b""
        self._started: asyncio.Future[str] | None = None
        self._first_words = ""
        self._questions: OrderedDict[int, str] = OrderedDict()
        self._names: OrderedDict[str, str] = OrderedDict()
        self._refreshed: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._stale: dict[str, set[str]] = {}
        self.policy = _CLOSED
        """The one in force."""

    @property
    def mac(self) -> str:
        """The guest's address on its link."""
        return GUEST_MAC

    def begin(self) -> None:
        """Has the namespace made; `tap` waits for it."""
        self._linking = self._task(self._namespace.open(self._filter))
        self._opening = self._task(self._open(self._linking))

    def report_to(
        self, cell: Callable[[], str], tell: Callable[[str], None], trouble: Callable[[str], None]
    ) -> None:
        """Who is told from now on.

        Args:
            cell: id of the cell that runs; empty when none does.
            tell: gets a sentence for whoever runs a cell, about what was refused.
            trouble: gets a sentence when the network has ended by itself.
        """
        self._refusals.report_to(cell, tell)
        self._trouble = trouble

    async def tap(self) -> int:
        """The other end of the guest's link, once it is guarded.

        Raises:
            NetworkError: this host does not let us; MissingToolError: a program is missing.
        """
        assert self._linking is not None
        await asyncio.shield(self._linking)
        return self._namespace.tap

    def plugged(self) -> None:
        """QEMU has the guest's link."""
        self._namespace.close_tap()

    async def apply(self, policy: Policy) -> None:
        """Has another policy hold from now on, for connections that there are, too.

        It is done as a whole, or not, also when whoever waits for it gives up.

        Raises:
            NetworkError, MissingToolError: it cannot be; the one before is in force, or no name is found.
        """
        task = self._task(self._apply(policy))
        await asyncio.wait((task,))
        if task.cancelled():
            raise NetworkError(
                "The kernel's network has ended meanwhile; restart the kernel to have it again."
            )
        task.result()

    async def _apply(self, policy: Policy) -> None:
        assert self._opening is not None
        async with self._changing:
            await asyncio.shield(self._opening)
            dnsmasq = find("dnsmasq", "install the package dnsmasq-base or do without `network`")
            bwrap = find("bwrap", "install the package bubblewrap")
            await self._filter(policy)
            words = ["prlimit", f"--data={_MEMORY}", "--core=0", "--"]
            words += confined_within(bwrap, dnsmasq, ("CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"))
            command = resolver.command(dnsmasq, policy, self._generation)
            self._hang_up()
            _, fds = await self._namespace.ask(
                "resolver",
                argv=[*words, "--dev", "/dev", "--chdir", "/", "--", *command],
            )
            started = self._listen(fds[0])
            try:
                async with asyncio.timeout(_PATIENCE):
                    said = await started
            except TimeoutError:
                said = f"it has not begun within {_PATIENCE:g} s"
            if said:
                raise NetworkError(
                    f"The kernel's DNS server does not start ({said}); look at the supervisor's log."
                )
            await self._namespace.ask("rate", bytes=policy.bandwidth)
            log.info("network: %s, %d rules", policy.mode, len(policy.allow) + len(policy.deny))

    async def counters(self) -> tuple[int, int]:
        """Bytes that the guest has received, and sent.

        Raises:
            NetworkError: the namespace is gone.
        """
        answer, _ = await self._namespace.ask("counters")
        return int(answer["received"]), int(answer["sent"])

    async def aclose(self) -> None:
        """Ends all of it; idempotent."""
        await self._stack.aclose()

    async def _open(self, linking: asyncio.Task[None]) -> None:
        await asyncio.shield(linking)
        await self._namespace.open_uplink()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._namespace.log, self._read_log)
        self._stack.callback(loop.remove_reader, self._namespace.log)
        self._task(self._watch())

    async def _filter(self, policy: Policy = _CLOSED) -> None:
        generation = next(self._generations)  # never one that was tried before, whatever came of that
        await self._namespace.ask("rules", text=ruleset(policy, generation, own_addresses()))
        self._generation = generation
        self.policy = self._refusals.policy = policy
        # The sets are new ones.
        self._refreshed.clear()
        self._stale = {}

    async def _watch(self) -> None:
        """Tells when a part of it has ended: the guest is cut off, never let through."""
        why = await self._namespace.ended()
        self._trouble(f"The kernel's network has ended ({why}); restart the kernel to have it again.")

    def _read_log(self) -> None:
        try:
            for _ in range(_DATAGRAMS):
                for refused in nflog.read(self._namespace.log.recv(_PIECE)):
                    self._refusals.note(refused.why, str(refused), self._names.get(refused.address, ""))
        except BlockingIOError:
            pass
        except OSError as error:
            log.info("refusals were not all noted (%s)", error)  # ENOBUFS: there were too many

    def _listen(self, fd: int) -> asyncio.Future[str]:
        """Reads the log of a resolver that has just been started, and no other's any more.

        Returns:
            When it answers: nothing; when it never will: why.
        """
        loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._log_of_resolver, self._rest, self._first_words = fd, b"", ""
        self._questions.clear()
        self._started = loop.create_future()
        loop.add_reader(fd, self._read_resolver)
        return self._started

    def _hang_up(self) -> None:
        if self._log_of_resolver >= 0:
            asyncio.get_running_loop().remove_reader(self._log_of_resolver)
            os.close(self._log_of_resolver)
            self._log_of_resolver = -1
            self._settle(self._first_words or "it has ended")

    def _settle(self, why_not: str) -> None:
        """The resolver has started, or will not; whoever waits for that hears it."""
        if self._started is not None and not self._started.done():
            self._started.set_result(why_not)

    def _read_resolver(self) -> None:
        try:
            data = os.read(self._log_of_resolver, _PIECE)
        except BlockingIOError:
            return
        if not data:
            began = self._started is not None and self._started.done()
            self._hang_up()
            if began:
                self._trouble(
                    "The kernel's DNS server has ended, so that no name is found any more; "
                    "restart the kernel."
                )
            return
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_LONGEST_LINE:]
        for line in lines:
            text = line.decode(errors="replace")
            said = resolver.read(text)
            if said is not None:
                self._note(said)
            elif resolver.has_started(text):
                self._settle("")
            elif "dnsmasq[" not in text:  # a beginning that fails
                log.warning("the resolver: %s", text[:_WORDS])
                self._first_words = self._first_words or text[:_WORDS]

    def _note(self, said: resolver.Said) -> None:
        if said.kind == "asked":
            _remember(self._questions, said.serial, said.name)
        elif said.kind == "unknown":
            denied = any(rule.names(said.name) for rule in self.policy.deny)
            self._refusals.note("denied-name" if denied else "name", said.name)
        elif said.kind == "rebinding":
            self._refusals.note("rebinding", said.name)
        else:
            name = self._questions.get(said.serial)
            if name is not None:  # else it is no address: the text of a TXT record can look like one
                _remember(self._names, said.value, name)
                self._prolong(name, said.value)

    def _prolong(self, name: str, address: str) -> None:
        """An address was told to the guest, which may be in a set already, and not for long any more."""
        now = time.monotonic()
        for place in resolver.sets_of(self.policy, self._generation, name, 6 if ":" in address else 4):
            before = self._refreshed.get((place, address))
            if before is not None and now - before < _YOUNG:
                continue
            _remember(self._refreshed, (place, address), now)
            if not self._stale:
                self._task(self._refresh())
            self._stale.setdefault(place, set()).add(address)

    async def _refresh(self) -> None:
        await asyncio.sleep(_TOGETHER)
        async with self._changing:
            stale, self._stale = self._stale, {}
            if not stale:  # another policy holds since
                return
            try:
                await self._namespace.ask("rules", text=refresh(stale))
            except NetworkError as error:
                log.warning("addresses were not kept: %s", error)

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may have waited: of what was begun, the first that is needed tells

    async def _end_tasks(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remember(where: OrderedDict, key: object, value: object) -> None:  # type: ignore[type-arg]
    where[key] = value
    while len(where) > _REMEMBERED:
        where.popitem(last=False)
