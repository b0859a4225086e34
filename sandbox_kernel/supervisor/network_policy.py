"""What a VM's network may reach, as it is changed while the kernel runs, within the administrator's caps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.spec import VMSpec, resolve

if TYPE_CHECKING:
    from sandbox_kernel.network.network import Network

_KEYS = ("network", "network_allow", "network_deny", "network_connections", "network_bandwidth")
"""What of a network can be changed while the kernel runs."""


class NetworkPolicy:
    """The policy of one VM's network."""

    def __init__(self, network: Network | None, spec: VMSpec, caps: Mapping[str, Any]) -> None:
        """What was launched.

        Args:
            network: None for a VM without.
            spec: what holds now.
            caps: the administrator's, by their names.
        """
        self._network, self._caps = network, caps
        self.spec = spec
        """What holds now."""

    async def change(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Has another policy hold, where `request` names one.

        Returns:
            What holds then, by the keys' names.

        Raises:
            ConfigurationError: the VM has no network, or what is asked for makes no sense or is beyond a cap.
            NetworkError: it cannot be; the one before holds.
        """
        if self._network is None:
            raise ConfigurationError(
                "This VM has no network device; start the kernel with `network`, such as 'allowlist'."
            )
        given = {name: request[name] for name in _KEYS if request.get(name) is not None}
        now = {name: getattr(self.spec, name) for name in _KEYS}
        if not given:
            return {"network": now}
        # Where nothing is reached, nothing is to be named that would be.
        closed = given.get("network", now["network"]) == "none"
        kept = {"network_allow": ()} if closed else {"host_services": self.spec.host_services}
        spec = resolve([("the request", {**now, **kept, **given})], self._caps)
        await self._network.apply(spec.policy)
        changed = {name: getattr(spec, name) for name in _KEYS}
        self.spec = replace(self.spec, **changed)
        return {"network": changed}
