"""What every test may ask for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.store import ImageStore

# A property says nothing of time, and a busy machine does not falsify it; `timeout` ends what hangs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def installed() -> None:
    """`sandbox-kernel setup` has been run: there is a default image and the kernelspec."""
    try:
        ImageStore().open("default")
        KernelSpecManager().get_kernel_spec("python3-microvm")
    except (ImageError, NoSuchKernel) as error:
        pytest.fail(f"{error} (`make setup` does that)")
