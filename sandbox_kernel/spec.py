"""What a micro-VM is to be: one frozen dataclass, validated once, passed down whole.

A value comes from the first source that names it: the kernelspec (`metadata.kernel_provisioner.config` of
kernel.json), the administrator's traitlets, the environment (`SANDBOX_KERNEL_<KEY>`), the default in
`KEYS`. Caps (`max_memory` and all of `CAPS`) come from the administrator alone and bind whatever the other
sources say; where 0 means "no limit", a cap makes it a limit. An unknown key, a wrong type or a value out of
range is a `ConfigurationError` that names the key, where it came from and what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_kernel import exposure, mount, policy, volume
from sandbox_kernel.errors import ConfigurationError

ENVIRONMENT_PREFIX = "SANDBOX_KERNEL_"

_NO_LIMIT = "no limit"
_LONGEST = 31536000.0
"""Seconds of a year: more is meant to be no limit."""

_PRELOADS = 16
"""Modules to preload; their names travel on the guest kernel's command line, which has 2 KiB."""

ALWAYS_FORWARDED = (
    "JPY_SESSION_NAME",
    "IPYKERNEL_CELL_NAME",
    "COLUMNS",
    "LINES",
    "MPLBACKEND",
    "PYDEVD_DISABLE_FILE_VALIDATION",
)
"""Variables that Jupyter sets for a kernel; everything else on the host stays there unless `env` names it."""


@dataclass(frozen=True)
class VMSpec:
    """Everything that shapes one micro-VM, already validated.

    Attributes:
        image: name or digest of a guest image.
        memory: RAM of the guest in MiB.
        vcpus: virtual CPUs.
        accelerator: `auto`, `kvm` or `tcg`.
        vsock: `auto`, `kernel` (/dev/vhost-vsock) or `userspace`.
        transport: `ipc` or `tcp`, on the client's side.
        env: patterns (`NAME` or `PREFIX_*`) of host variables that the kernel may see.
        boot_timeout: seconds from launch to a kernel that accepts connections.
        cpu_quota: the host's CPUs, or parts of one, that the VM may take; 0: as many as it has virtual ones.
        disk: MiB of a scratch disk for what the kernel writes; 0: half of the memory, in memory.
        disk_bandwidth: MiB a second to and from the VM's disks; 0: any number.
        disk_iops: reads and writes of the VM's disks a second; 0: any number.
        processes: processes and threads that the kernel may have in the guest.
        cell_timeout: seconds that one cell may run; 0: any time.
        cell_grace: seconds that a cell has to end after each warning: the interrupt, and the dump of stacks.
        idle_timeout: seconds without a request or a running cell after which the VM ends; 0: never.
        lifetime: seconds after which the VM ends; 0: never.
        output: MiB that one cell may put out; 0: any amount.
        message_size: MiB of one message from the kernel.
        message_rate: messages a second that the kernel may publish before it has to wait; 0: any number.
        unenforced: `warn` or `refuse`: what to do where this host cannot enforce a limit.
        mounts: directories of the host, as mount.py describes them.
        volumes: disks that outlive the kernel, as volume.py describes them.
        workdir: directory of the guest that the kernel starts in; its user's home when empty.
        network: `none` (no network device at all), `allowlist`, `public` or `full`; see policy.py.
        network_allow: what may be reached beside that, as policy.py describes rules.
        network_deny: what may not be reached, whatever else says.
        network_bandwidth: MiB a second in each direction; 0: any number.
        network_connections: connections, and flows of datagrams, at a time.
        host_services: TCP ports of the host's loopback that the guest reaches at `host.internal`.
        expose: ports of the guest on the host's loopback, as exposure.py describes them.
        start: `auto` (restored from a template where there is one) or `cold`.
        preload: Python modules that are imported in the template.
    """

    image: str = "default"
    memory: int = 1024
    vcpus: int = 1
    accelerator: str = "auto"
    vsock: str = "auto"
    transport: str = "ipc"
    env: tuple[str, ...] = ()
    boot_timeout: float = 60.0
    cpu_quota: float = 0.0
    disk: int = 0
    disk_bandwidth: float = 0.0
    disk_iops: int = 0
    processes: int = 4096
    cell_timeout: float = 0.0
    cell_grace: float = 5.0
    idle_timeout: float = 0.0
    lifetime: float = 0.0
    output: float = 0.0
    message_size: float = 256.0
    message_rate: float = 0.0
    unenforced: str = "warn"
    mounts: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    workdir: str = ""
    network: str = "none"
    network_allow: tuple[str, ...] = ()
    network_deny: tuple[str, ...] = ()
    network_bandwidth: float = 0.0
    network_connections: int = 256
    host_services: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    start: str = "auto"
    preload: tuple[str, ...] = ()

    @property
    def shape(self) -> VMSpec:
        """What of it a VM that runs cannot be given any more; the rest is as in every spec."""
        network = "none" if self.network == "none" else "full"  # there is a device, or there is none
        plain = {name: getattr(DEFAULT, name) for name in _NOT_OF_THE_VM}
        return dataclasses.replace(self, network=network, **plain)

    @property
    def policy(self) -> policy.Policy:
        """What its network may reach.

        Raises:
            ConfigurationError: a rule is none.
        """
        return policy.policy(
            *(self.network, self.network_allow, self.network_deny, self.host_services),
            *(self.network_connections, self.network_bandwidth),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VMSpec:
        """The inverse of `dataclasses.asdict` after a trip through JSON, validated again."""
        return resolve([("the supervisor's request", values)])


DEFAULT = VMSpec()

_NOT_OF_THE_VM = (
    *("transport", "env", "boot_timeout", "processes", "mounts", "volumes", "workdir", "expose"),
    *("network_allow", "network_deny", "network_bandwidth", "network_connections"),
    *("cell_timeout", "cell_grace", "idle_timeout", "lifetime", "output", "message_size", "message_rate"),
)
"""What is not decided before a kernel is launched."""


@dataclass(frozen=True)
class Key:
    """One thing that can be configured: how to check it and how to say what is allowed."""

    name: str
    kind: type
    allowed: str
    minimum: float = 0
    maximum: float = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""
    most: int = 256
    zero: str = ""

    def parse(self, text: str) -> Any:
        """The value that an environment variable's text stands for; the text itself when it is none."""
        if self.kind is tuple:
            return text.split()
        if self.kind in (int, float):
            try:
                return self.kind(text)
            except ValueError:
                return text
        return text

    def accepts(self, value: Any) -> bool:
        """Whether `value` has the right type and lies within this key's own range."""
        if self.kind is tuple:
            return (
                isinstance(value, list | tuple)
                and len(value) <= self.most
                and all(isinstance(item, str) and re.fullmatch(self.pattern, item) for item in value)
            )
        if self.kind is str:
            return isinstance(value, str) and (
                value in self.choices if self.choices else bool(re.fullmatch(self.pattern, value))
            )
        number = int if self.kind is int else int | float
        return (
            isinstance(value, number)
            and not isinstance(value, bool)
            and (self.minimum <= value <= self.maximum or (self.zero != "" and value == 0))
        )

    def exceeds(self, value: Any, limit: Any) -> bool:
        """Whether a value is more than an administrator's `limit`; choices stand in rising order."""
        if self.choices:
            return self.choices.index(value) > self.choices.index(limit)
        return value > limit or (self.zero == _NO_LIMIT and value == 0 and limit != 0)

    def normalise(self, value: Any) -> Any:
        """An accepted value in the type that `VMSpec` stores."""
        return tuple(value) if self.kind is tuple else self.kind(value)


def _number(name: str, kind: type, minimum: float, maximum: float, unit: str, zero: str = "") -> Key:
    """A number in a range; `zero` is what 0 stands for, where that is allowed."""
    word = "a whole number" if kind is int else "a number"
    allowed = f"{word} from {minimum:g} to {maximum:.15g}{unit}" + (f" or 0 ({zero})" if zero else "")
    return Key(name, kind, allowed, minimum=minimum, maximum=maximum, zero=zero)


def _choice(name: str, *choices: str) -> Key:
    return Key(name, str, "one of " + ", ".join(choices), choices=choices)


def _rules(name: str) -> Key:
    allowed = "a list of network rules such as pypi.org, *.pypi.org:443 or 10.1.0.0/16:5432/tcp"
    return Key(name, tuple, allowed, pattern=policy.PATTERN, most=64)


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key(
            "image",
            str,
            "an image's name or digest (letters, digits, `.`, `_`, `-`)",
            pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
        ),
        _number("memory", int, 192, 1048576, " MiB"),
        _number("vcpus", int, 1, 64, ""),
        _choice("accelerator", "auto", "kvm", "tcg"),
        _choice("vsock", "auto", "kernel", "userspace"),
        _choice("transport", "ipc", "tcp"),
        Key(
            "env",
            tuple,
            "a list of variable names, each with at most one `*`, at its end",
            pattern=r"[A-Za-z_][A-Za-z0-9_]*\*?",
        ),
        _number("boot_timeout", float, 1, 3600, " s"),
        _number("cpu_quota", float, 0.01, 64, " CPUs", _NO_LIMIT),
        _number("disk", int, 16, 16777216, " MiB", "half of the memory, in memory"),
        _number("disk_bandwidth", float, 0.01, 1048576, " MiB/s", _NO_LIMIT),
        _number("disk_iops", int, 1, 10000000, " a second", _NO_LIMIT),
        _number("processes", int, 16, 1048576, ""),
        _number("cell_timeout", float, 0.1, _LONGEST, " s", _NO_LIMIT),
        _number("cell_grace", float, 0.1, 3600, " s"),
        _number("idle_timeout", float, 1, _LONGEST, " s", _NO_LIMIT),
        _number("lifetime", float, 1, _LONGEST, " s", _NO_LIMIT),
        _number("output", float, 0.001, 1048576, " MiB", _NO_LIMIT),
        _number("message_size", float, 0.1, 4096, " MiB"),
        _number("message_rate", float, 1, 1000000, " messages/s", _NO_LIMIT),
        _choice("unenforced", "warn", "refuse"),
        Key(
            "mounts",
            tuple,
            "a list of SOURCE:TARGET[:ro|:rw], paths that begin with `/`, {cwd} or {notebook_dir}",
            pattern=mount.PATTERN,
            most=16,
        ),
        Key(
            "volumes",
            tuple,
            "a list of NAME:TARGET[:ro|:rw], each a volume's name and an absolute path",
            pattern=volume.PATTERN,
            most=volume.MOST,
        ),
        Key(
            "workdir",
            str,
            "an absolute path of the guest, {cwd}, {notebook_dir}, or empty for its user's home",
            pattern=r"((/|\{(cwd|notebook_dir)\})[^\0]{0,1023})?",
        ),
        _choice("network", *policy.MODES),
        _rules("network_allow"),
        _rules("network_deny"),
        _number("network_bandwidth", float, 0.001, 1048576, " MiB/s", _NO_LIMIT),
        _number("network_connections", int, 1, 65536, ""),
        Key(
            "host_services",
            tuple,
            "a list of TCP ports of this host, as PORT or GUEST:HOST",
            pattern=policy.SERVICE_PATTERN,
            most=16,
        ),
        Key(
            "expose",
            tuple,
            "a list of GUEST, GUEST:PORT or GUEST:/SOCKET, where a path begins with `/` or {cwd}",
            pattern=exposure.PATTERN,
            most=exposure.MOST,
        ),
        _choice("start", "auto", "cold"),
        Key(
            "preload",
            tuple,
            "a list of names of Python modules",
            pattern=r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*",
            most=_PRELOADS,
        ),
    )
}
"""Every key that a kernelspec, traitlets or the environment may set."""

LIMITS = (
    *("memory", "vcpus", "cpu_quota", "disk", "disk_bandwidth", "disk_iops", "processes"),
    *("cell_timeout", "idle_timeout", "lifetime", "boot_timeout", "output", "message_size", "message_rate"),
    *("network", "network_bandwidth", "network_connections"),
)
"""The keys that limit what a VM may have."""

CAPS: dict[str, str] = {
    "max_memory": "memory",
    "max_vcpus": "vcpus",
    "max_boot_timeout": "boot_timeout",
    "max_cpu_quota": "cpu_quota",
    "max_disk": "disk",
    "max_disk_bandwidth": "disk_bandwidth",
    "max_disk_iops": "disk_iops",
    "max_processes": "processes",
    "max_cell_timeout": "cell_timeout",
    "max_idle_timeout": "idle_timeout",
    "max_lifetime": "lifetime",
    "max_output": "output",
    "max_message_size": "message_size",
    "max_message_rate": "message_rate",
    "max_network": "network",
    "max_network_bandwidth": "network_bandwidth",
    "max_network_connections": "network_connections",
}
"""The administrator's caps and the keys they bind."""


def from_environment(environ: Mapping[str, str], names: Sequence[str] = ()) -> dict[str, Any]:
    """What the environment configures: `SANDBOX_KERNEL_MEMORY=2048` is `{"memory": 2048}`.

    Args:
        environ: usually `os.environ`.
        names: the keys to look for; all of `KEYS` when empty.
    """
    found = {}
    for name in names or KEYS:
        text = environ.get(ENVIRONMENT_PREFIX + name.upper())
        if text is not None:
            found[name] = KEYS[CAPS.get(name, name)].parse(text)
    return found


def resolve(
    sources: Sequence[tuple[str, Mapping[str, Any]]], caps: Mapping[str, Any] | None = None
) -> VMSpec:
    """One validated spec out of several sources.

    Args:
        sources: (where it comes from, key to value) in falling precedence; None as a value is "not set".
        caps: the administrator's `max_*` values; None as a value is "no cap".

    Raises:
        ConfigurationError: an unknown key, a wrong type, a value out of range or over a cap.
    """
    chosen: dict[str, tuple[str, Any]] = {}
    for origin, values in sources:
        for name, value in values.items():
            if name not in KEYS:
                raise ConfigurationError(
                    f"{origin} sets {name!r}, which is no key of a micro-VM; allowed are {', '.join(KEYS)}."
                )
            if value is not None and name not in chosen:
                chosen[name] = (origin, value)
    for name, (origin, value) in chosen.items():
        key = KEYS[name]
        if not key.accepts(value):
            raise ConfigurationError(f"{origin} sets {name} to {_shown(value)}; allowed is {key.allowed}.")
    spec = VMSpec(**{name: KEYS[name].normalise(value) for name, (_, value) in chosen.items()})
    _ = spec.policy  # its rules are right, or this says which is not
    for cap, limit in (caps or {}).items():
        if limit is None:
            continue
        if cap not in CAPS:
            raise ConfigurationError(f"{cap!r} is not a cap; allowed are {', '.join(CAPS)}.")
        name = CAPS[cap]
        if not KEYS[name].accepts(limit):
            raise ConfigurationError(f"{cap} is {_shown(limit)}; allowed is {KEYS[name].allowed}.")
        value = getattr(spec, name)
        if KEYS[name].exceeds(value, limit):
            if name not in chosen:
                spec = dataclasses.replace(spec, **{name: KEYS[name].normalise(limit)})
                continue
            raise ConfigurationError(
                f"{chosen[name][0]} sets {name} to {_amount(name, value)}, over the administrator's limit "
                f"{cap} = {_plain(limit)}; ask for {_plain(limit)} or less."
            )
    return spec


def mount_roots(environ: Mapping[str, str], configured: Sequence[str] | None) -> tuple[str, ...] | None:
    """What the administrator lets be mounted, by traits or else the environment; None: all of the host.

    Raises:
        ConfigurationError: one of them is no directory's path.
    """
    text = environ.get(f"{ENVIRONMENT_PREFIX}MOUNT_ROOTS")
    roots = configured if configured is not None else text.split() if text is not None else None
    for root in roots or ():
        if not re.fullmatch(mount.ROOT_PATTERN, root):
            raise ConfigurationError(
                f"mount_roots has {_shown(root)}; allowed are absolute paths, with :ro behind those where "
                "nothing may be written."
            )
    return None if roots is None else tuple(roots)


def max_expose(environ: Mapping[str, str], configured: int | None) -> int | None:
    """How many ports the administrator lets be exposed, by traits or else the environment; None: any number.

    Raises:
        ConfigurationError: that is no number.
    """
    text = environ.get(f"{ENVIRONMENT_PREFIX}MAX_EXPOSE")
    if configured is None and text is None:
        return None
    most = configured if configured is not None else int(text) if text and text.isdecimal() else -1
    if most < 0:
        shown = _shown(text if configured is None else configured)
        raise ConfigurationError(f"max_expose is {shown}; allowed is a whole number, 0 to expose none.")
    return most


def placed(
    spec: VMSpec, where: Mapping[str, str], roots: Sequence[str] | None, most_exposed: int | None = None
) -> VMSpec:
    """`spec` with mounts, exposed ports and the kernel's directory where one kernel has them.

    Args:
        spec: with `{cwd}` and `{notebook_dir}` in it.
        where: what they stand for (mount.py, `places`).
        roots: what the administrator lets be mounted.
        most_exposed: how many ports the administrator lets be exposed.

    Raises:
        ConfigurationError: something is not to be mounted, or not to be exposed.
    """
    mounts = mount.fill_in(spec.mounts, where)
    parsed = [mount.parse(text) for text in mounts]
    mount.check(parsed, roots)
    volume.check([volume.parse(text) for text in spec.volumes], parsed)
    [workdir] = mount.fill_in((spec.workdir,), where)
    expose = exposure.fill_in(spec.expose, where)
    exposure.check([exposure.parse(text) for text in expose], most_exposed)
    return dataclasses.replace(spec, mounts=mounts, workdir=workdir, expose=expose)


def _amount(name: str, value: Any) -> str:
    return f"0 ({KEYS[name].zero})" if KEYS[name].zero and value == 0 else _plain(value)


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{value:g}"


def forwarded(patterns: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that the kernel may see: what Jupyter sets for it and what `patterns` name."""
    return {
        name: value
        for name, value in environ.items()
        if name in ALWAYS_FORWARDED or any(_matches(pattern, name) for pattern in patterns)
    }


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def keys_with_defaults() -> Iterator[tuple[Key, Any]]:
    """Each key beside its default, for documentation and `doctor`."""
    for field in dataclasses.fields(VMSpec):
        yield KEYS[field.name], field.default
