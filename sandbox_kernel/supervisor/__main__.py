"""`python -m sandbox_kernel.supervisor CONTROL_FD`: one supervisor."""

import os
import sys

from sandbox_kernel.supervisor.entry import run

if __name__ == "__main__":
    status = run(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # an interpreter's farewell takes a while, and there is nothing left to say
