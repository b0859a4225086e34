"""jupyter_kernel_test for the kernel under test, written as that package's documentation asks kernels to.

It runs beside the source distribution's `test_ipykernel.py`, which tests the stock kernelspec under the
default provisioner; this one tests the kernelspec that users choose, and the `iopub_welcome` message.
"""

from __future__ import annotations

import os

import jupyter_kernel_test  # type: ignore[import-not-found]
import test_ipykernel  # type: ignore[import-not-found]  # lies beside this file when it runs


class KernelUnderTest(test_ipykernel.IPyKernelTests):  # type: ignore[misc]
    kernel_name = os.environ["CONFORMANCE_KERNEL"]
    support_iopub_welcome = True


class IopubWelcome(jupyter_kernel_test.IopubWelcomeTests):  # type: ignore[misc]
    kernel_name = os.environ["CONFORMANCE_KERNEL"]
    support_iopub_welcome = True
