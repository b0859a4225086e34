"""Memory in pages of 4 KiB, for this process and every program that it runs.

Linux may back anonymous memory by pages of 2 MiB, from the first byte on that is touched. QEMU asks for that
(madvise(2), MADV_HUGEPAGE) where it translates code, and for each of its devices' memories: for a VM of which
there are many that is mostly memory for nothing. A template's RAM is a file, whose private pages are always
small, so a guest does not notice.
"""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger(__name__)

_PR_SET_THP_DISABLE = 41


def do_without() -> None:
    """Has no huge page given to this process from now on, nor to its children, whatever they execute.

    A host that does not know that (PR_SET_THP_DISABLE, prctl(2), Linux 3.15) gives them as before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_THP_DISABLE, ctypes.c_ulong(1), zero, zero, zero) != 0:
        log.debug("huge pages stay: %s", os.strerror(ctypes.get_errno()))
