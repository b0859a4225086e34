"""What the tests of VMs may ask for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.host import template
from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.paths import data_dir
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.nursery import nursery
from sandbox_kernel.template.store import TemplateStore
from tests.microvm import until

LIMIT = 2.0
"""Seconds within which everything of a killed kernel must be gone (SPECIFICATION.md, 'Clean-up')."""


@pytest.fixture(scope="session")
def image() -> Image:
    """The default image, built first if it is missing or the guest's programs have changed."""
    store = ImageStore()
    build(Order(default_recipe()), store, Silent())
    return store.open()


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, installed: None) -> Iterator[Path]:
    """A runtime directory of its own, for a pool of its own; nothing may be left in it."""
    template.ensure(VMSpec(), Silent())
    folder = Path(tempfile.mkdtemp(prefix="skp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder / "sandbox-kernel"
    nursery.close()  # what waits for the next kernel of this process, or is still being begun
    gone = until(lambda: not list(folder.glob("*/*")), LIMIT)
    left = [str(path) for path in folder.glob("*/*")]
    shutil.rmtree(folder)
    assert gone, left


@pytest.fixture
def own_store(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemplateStore:
    """A data folder with the same image and templates of its own, of which there are none."""
    folder = tmp_path / "sandbox-kernel"
    folder.mkdir()
    (folder / "images").symlink_to(data_dir() / "images")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return TemplateStore()
