"""What a pool is to keep, from `pool.toml` in the configuration folder and the command line.

memory = 4096         # MiB that all waiting VMs together may have
max_age = 3600        # seconds after which a waiting VM is replaced

[kernels]             # how many to keep waiting, by kernelspec
python3-microvm = 2
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox_kernel import paths
from sandbox_kernel.errors import ConfigurationError

FILE = "pool.toml"
_MOST = 1000
_LONGEST = 7 * 86400
_LARGEST = 1 << 20


@dataclass(frozen=True)
class PoolConfig:
    """What a pool is to keep.

    Attributes:
        kernels: how many VMs to keep waiting, by kernelspec.
        memory: MiB that all of them together may have.
        max_age: seconds after which a waiting VM is replaced.
    """

    kernels: Mapping[str, int] = field(default_factory=lambda: {"python3-microvm": 1})
    memory: int = 2048
    max_age: int = 3600


def load(file: Path | None = None) -> PoolConfig:
    """The configuration in `file`, which has to exist when named; the user's own, or the defaults, otherwise.

    Raises:
        ConfigurationError: the file cannot be read, or says something that is not allowed.
    """
    place = file or paths.config_dir() / FILE
    try:
        content = tomllib.loads(place.read_text())
    except FileNotFoundError as error:
        if file is None:
            return PoolConfig()
        raise ConfigurationError(
            f"There is no file {place}; write it as `sandbox-kernel pool -h` says."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The pool's configuration {place} cannot be read ({error}).") from error
    return _checked(content, str(place))


def override(
    config: PoolConfig, kernels: Mapping[str, int], memory: int | None, max_age: int | None
) -> PoolConfig:
    """`config` with what the command line says instead.

    Raises:
        ConfigurationError: it says something that is not allowed.
    """
    said: dict[str, Any] = {"kernels": dict(kernels)} if kernels else {}
    said |= {} if memory is None else {"memory": memory}
    said |= {} if max_age is None else {"max_age": max_age}
    checked = _checked(said, "The command line")
    return replace(config, **{name: getattr(checked, name) for name in said})


def _checked(content: Mapping[str, Any], origin: str) -> PoolConfig:
    known = {"memory": (1, _LARGEST, " MiB"), "max_age": (1, _LONGEST, " s")}
    for name, value in content.items():
        if name == "kernels":
            if not isinstance(value, dict):
                raise ConfigurationError(f"{origin}: kernels is a table from kernelspec to number.")
            for kernel, size in value.items():
                _number(size, 0, _MOST, f"{origin}: the pool's size for {kernel!r}", "")
        elif name in known:
            low, high, unit = known[name]
            _number(value, low, high, f"{origin}: {name}", unit)
        else:
            raise ConfigurationError(
                f"{origin} sets {name!r}, which a pool does not know; allowed are kernels, memory, max_age."
            )
    return PoolConfig(**content)


def _number(value: Any, low: int, high: int, what: str, unit: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigurationError(
            f"{what} is {value!r}; allowed is a whole number from {low} to {high}{unit}."
        )
