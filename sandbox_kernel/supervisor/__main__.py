"""`python -m sandbox_kernel.supervisor CONTROL_FD`: one supervisor."""

import sys

from sandbox_kernel.supervisor.process import run

if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
