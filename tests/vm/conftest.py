"""The guest image that the tests in here boot."""

from __future__ import annotations

import pytest

from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import Image, ImageStore


@pytest.fixture(scope="session")
def image() -> Image:
    """The default image, built first if it is missing or the guest's programs have changed."""
    store = ImageStore()
    build(Order(default_recipe()), store, Silent())
    return store.open()
