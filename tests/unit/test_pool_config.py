"""What a pool is told to keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.pool.config import PoolConfig, load, override


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "pool.toml"
    file.write_text(text)
    return file


def test_a_file_says_what_to_keep(tmp_path: Path) -> None:
    file = written(tmp_path, "memory = 4096\nmax_age = 60\n[kernels]\npython3-microvm = 2\nscience = 0\n")
    assert load(file) == PoolConfig({"python3-microvm": 2, "science": 0}, 4096, 60)


def test_without_a_file_there_are_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load() == PoolConfig()
    (tmp_path / "sandbox-kernel").mkdir()
    written(tmp_path / "sandbox-kernel", "max_age = 7")
    assert load().max_age == 7


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no file .*/none.toml; write it as"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memory = 0", "memory is 0; allowed is a whole number from 1 to 1048576 MiB."),
        ("max_age = 1.5", "max_age is 1.5; allowed is a whole number from 1 to 604800 s."),
        ("kernels = 3", "kernels is a table from kernelspec to number."),
        ("[kernels]\na = true", "the pool's size for 'a' is True; allowed is a whole number from 0 to 1000."),
        ("size = 3", "sets 'size', which a pool does not know; allowed are kernels, memory, max_age."),
        ("memory =", "cannot be read"),
    ],
)
def test_what_is_not_allowed_is_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(written(tmp_path, text))
    assert sentence in str(caught.value)


def test_the_command_line_comes_first() -> None:
    config = PoolConfig({"a": 1, "b": 2}, 100, 60)
    assert override(config, {}, None, None) == config
    assert override(config, {"c": 3}, None, 5) == PoolConfig({"c": 3}, 100, 5)
    with pytest.raises(ConfigurationError, match="The command line: memory is -1"):
        override(config, {}, -1, None)
