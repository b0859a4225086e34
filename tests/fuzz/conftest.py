"""Long fuzzing runs only when it is asked for by `-m fuzz`; the guest's programs are importable as there."""

from __future__ import annotations

import sys

import pytest

from sandbox_kernel.resources import guest_dir

sys.path.append(str(guest_dir()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "fuzz" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("fuzz")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if item not in long]
