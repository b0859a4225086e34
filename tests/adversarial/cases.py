"""The attacks that a cell can make as the kernel's own user."""

from __future__ import annotations

from tests.adversarial.case import Case

MIB = 1 << 20

FILL = """
import errno, os
def fill(path):
    with open(path, 'wb', buffering=0) as file:
        while True: file.write(bytes(1 << 20))
"""

RAISE = "raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"

CASES = [
    Case(
        "fork bomb",
        "processes = 100",  # more copies of an interpreter come to the memory's limit first
        "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass",
        "interrupt",
        "KeyboardInterrupt",
        {"processes": 100},
        lasts=4,
    ),
    Case(
        "one thread after the other",
        "processes = 200",
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "error",
        "RuntimeError: can't start new thread",
        {"processes": 200},
    ),
    Case(
        "one allocation that is too large",
        "memory = 512",
        "bytearray(64 << 30)",
        "error",
        "MemoryError",
        {"memory": 512},
    ),
    Case(
        "one allocation, used",
        "memory = 512",
        "hog = bytearray(440 << 20)\nfor at in range(0, len(hog), 4096): hog[at] = 1",
        "death",
        "MemoryLimitExceeded",
        {"memory": 512},
    ),
    Case(
        "a million small allocations",
        "memory = 320",
        "hog = []\nwhile True: hog.append([None] * 64)",
        "death",
        "MemoryLimitExceeded",
        {"memory": 320},
    ),
    Case(
        "a memory storm",
        "memory = 512",
        """
import mmap
held = []
while True:
    part = mmap.mmap(-1, 16 << 20)
    for at in range(0, len(part), 4096): part[at] = 1
    held = held[-18:] + [part]
""",
        "interrupt",
        "KeyboardInterrupt",
        {"memory": 512},
    ),
    Case(
        "a storm of small objects",
        "memory = 512",
        "while True: held = [[None] * 64 for _ in range(400_000)]",
        "interrupt",
        "KeyboardInterrupt",
        {"memory": 512},
    ),
    Case(
        "a memory storm of many processes",
        "memory = 512",
        """
import mmap, os
while True:
    try: child = os.fork()
    except OSError: continue
    while not child:
        part = mmap.mmap(-1, 4 << 20)
        for at in range(0, len(part), 4096): part[at] = 1
        held = [held, part] if 'held' in globals() else [part]
""",
        "death",
        "MemoryLimitExceeded",
        {"memory": 512},
    ),
    Case(
        "memory in a tmpfs",
        "memory = 512",
        FILL + "fill('/dev/shm/file')",
        "error",
        "OSError: .*No space left on device",
        {"memory": 512},
    ),
    Case(
        "files in memory",
        "half of memory = 512",
        FILL + "fill('/tmp/file')",
        "error",
        "OSError: .*No space left on device",
        {"memory": 512},
    ),
    Case(
        "disk fill",
        "disk = 64",
        FILL + "fill('file')",
        "error",
        "OSError: .*No space left on device",
        {"disk": 64},
    ),
    Case(
        "inode fill",
        "disk = 64",
        "import os\nfor i in range(10**7): os.close(os.open(f'/tmp/{i}', os.O_CREAT))",
        "error",
        "OSError: .*No space left on device",
        {"disk": 64},
    ),
    Case(
        "spin on all vCPUs",
        "vcpus = 2",
        "import os\nos.fork()\nwhile True: pass",
        "interrupt",
        "KeyboardInterrupt",
        {"vcpus": 2},
    ),
    Case(
        "spin in C",
        "cell_timeout = 2",
        "sum(range(10**15))",
        "death",
        "CellTimeLimitExceeded",
        {"cell_timeout": 2, "cell_grace": 1},
    ),
    Case(
        "a flood of small messages",
        "back-pressure",
        "import sys\nwhile True: print('x', flush=True)",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "a flood of huge messages",
        "back-pressure",
        "while True: print('x' * (8 << 20))",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "a flood over the output limit",
        "output = 1",
        "for _ in range(400): print('x' * (1 << 16))",
        "output",
        r"\[sandbox-kernel\] The output limit of 1 MiB a cell was reached",
        {"output": 1},
    ),
    Case(
        "a flood over the message rate",
        "message_rate = 50",
        "from IPython.display import display\nwhile True: display(1)",
        "interrupt",
        "KeyboardInterrupt",
        {"message_rate": 50},
    ),
    Case(
        "comm flood",
        "back-pressure",
        "from comm import create_comm\nwhile True: create_comm(target_name='x', data={'x': 'y' * 1000})",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "a message of 1 GB",
        "message_size = 256",
        "from comm import create_comm\ncreate_comm(target_name='x', buffers=[bytes(1_000_000_000)])",
        "output",
        r"\[sandbox-kernel\] The kernel sent a message of 953.7 MiB, and message_size allows 256 MiB",
        {"memory": 3072},
    ),
    Case(
        "stdin never answered",
        "cell_timeout = 2",
        "input()",
        "error",
        "KeyboardInterrupt",
        {"cell_timeout": 2},
        stdin=True,
    ),
    Case(
        "SIGSTOP of itself",
        "interrupt",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "SIGKILL of its parent",
        "no rights over PID 1",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "error",
        "PermissionError",
    ),
    Case(
        "SIGSTOP of everything",
        "no rights over others",
        "import os, signal\nif os.fork() == 0:\n    os.kill(-1, signal.SIGSTOP)\nwhile True: pass",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "SIGKILL of everything",
        "no rights over others",
        "import os, signal\nif os.fork() == 0:\n    os.kill(-1, signal.SIGKILL)\nos.wait()",
        "death",
        "KernelExited",
    ),
    Case(
        "ptrace of PID 1",
        "no rights over PID 1",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nif libc.ptrace(16, 1, 0, 0): " + RAISE,
        "error",
        "PermissionError",
    ),
    Case(
        "remount of the root",
        "no capability",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.mount(None, b'/', None, 32 | 1, None): " + RAISE,
        "error",
        "PermissionError",
    ),
    Case(
        "loading a kernel module",
        "no capability",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "fd = os.open('/tmp/m', os.O_CREAT | os.O_RDWR)\n"
        "if libc.syscall(313, fd, b'', 0): " + RAISE,
        "error",
        "PermissionError",
    ),
    Case(
        "vsock to every host's port and other CIDs",
        "nothing listens",
        """
import socket
def knock(cid, port):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
        s.settimeout(1)
        try: s.connect((cid, port))
        except OSError: return False
        return True
host = [port for port in [*range(1, 1500), *range(6000, 6010), 2**31, 2**32 - 2] if knock(2, port)]
others = [cid for cid in [0, 4, 5, 6, 7, 42, 2**31, 2**32 - 2] for port in (1024, 6001) if knock(cid, port)]
print('open:', host, others)
""",
        "output",
        r"open: \[\] \[\]",
    ),
    Case(
        "vsock connection flood",
        "nothing listens",
        """
import socket
while True:
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try: s.connect((2, 1024))
    except OSError: pass
    s.close()
""",
        "interrupt",
        "KeyboardInterrupt",
    ),
    Case(
        "half-open streams",
        "nothing listens",
        """
import socket, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
held = []
for i in range(3000):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try: s.connect((2, 1024 + i))
    except OSError: pass
    held.append(s)
print(len(held), 'held')
""",
        "output",
        "3000 held",
    ),
    Case(
        "replies under a wrong key",
        "cell_timeout = 2",
        "kernel = get_ipython().kernel\nkernel.session.key = b'wrong'",
        "death",
        "CellTimeLimitExceeded",
        {"cell_timeout": 2, "cell_grace": 1},
    ),
    Case(
        "reboot",
        "no capability",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nif libc.reboot(0x1234567): " + RAISE,
        "error",
        "PermissionError",
    ),
    Case(
        "sysrq",
        "no rights",
        "open('/proc/sysrq-trigger', 'w').write('b')",
        "error",
        "PermissionError",
    ),
    Case(
        "the clock set back",
        "no capability",
        "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
        "error",
        "PermissionError",
    ),
]
