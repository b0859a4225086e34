"""`python -m sandbox_kernel.supervisor CONTROL_FD`: one supervisor."""

import os
import sys

from sandbox_kernel.supervisor import first


def main() -> None:
    """Runs a supervisor; see first.py for why its imports are where they are."""
    control_fd = int(sys.argv[1])
    first.confine()
    request = first.receive(control_fd)
    import asyncio  # noqa: F401

    if request.begun is not None:
        request.begun.turn()
    from sandbox_kernel.supervisor import process

    status = process.run(control_fd, request)
    sys.stderr.flush()
    os._exit(status)  # an interpreter's farewell takes a while, and there is nothing left to say


if __name__ == "__main__":
    main()
