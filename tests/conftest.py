"""What every test may ask for."""

from __future__ import annotations

import pytest
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.store import ImageStore


@pytest.fixture(scope="session")
def installed() -> None:
    """`sandbox-kernel setup` has been run: there is a default image and the kernelspec."""
    try:
        ImageStore().open("default")
        KernelSpecManager().get_kernel_spec("python3-microvm")
    except (ImageError, NoSuchKernel) as error:
        pytest.fail(f"{error} (`make setup` does that)")
