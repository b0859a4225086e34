"""What host and guest must agree on: vsock ports, the agent's messages, their limits. No I/O.

The image build copies this file into the guest as `agent_protocol.py`; it therefore imports nothing but
the standard library, and as little of that as it can (the guest's first second is emulated).

The agent listens on `AGENT_PORT`. A connection carries requests and responses in turn, one response to
each request, in order; a caller that wants two things at once opens two connections. Both directions use
the same frame:

    magic "SKA" + version   4 bytes
    JSON length             4 bytes, big-endian, at most MAX_JSON
    payload length          4 bytes, big-endian, at most MAX_PAYLOAD
    JSON object             UTF-8
    payload                 bytes: the content of files, the output of programs

A request is `{"op": name, ...}`; a response is `{"ok": true, ...}` or
`{"ok": false, "error": code, "message": sentence}`. A frame outside these rules is a `FrameError`: the
connection is closed, and on the host it counts as a broken guest.

Operations. Fields marked ? may be left out. Memory is in bytes, time in seconds unless it says otherwise.

    hello      → version, kernel (release), python (version), uptime, boot (object: phase to uptime when
               it was reached: "python" runs, "agent" listens)
    configure  clock? (ns since the epoch), step? (ns to add to the clock), hostname?, pids? (processes and
               threads of the kernel, at least 16), reserve? (available memory that the kernel may not have),
               scratch? (true: the second disk takes what the kernel writes from now on; once),
               network? (object: `ipv4` and `ipv6`, each with address, prefix, gateway, which is the DNS
               server, too: the network device is waited for and brought up; once);
               payload: at most MAX_ENTROPY bytes, credited to the random generator → clock (ns since the
               epoch)
    start      argv (`{connection_file}` is filled in), env, connection (object: what goes into the
               connection file beside the endpoints), cwd?, configuration? (object: fields of `configure`),
               mounts? (targets of mounts that are under way, which it waits for), volumes? (disks with an
               ext4 to be mounted: objects with serial, target and read_only?; before the mounts);
               payload as `configure` has it; both are applied before anything else → pid, adopted (whether
               a template's kernel has become it), clock (as `configure` has it). Once per guest, unless it
               failed. In a VM that was restored from a template the kernel runs already; its channels can
               be connected before, if `can_adopt` says so, and stay connected if it was adopted
    rehearse   configuration?; payload as for `start` → nothing. Does all that `start` does to a template's
               kernel, with an identity that nobody uses, and a kernel's first requests, so that an emulator
               has translated what will be run; `start` then finds things as they were. Any number of times
               before `start`; who is connected to a channel gets the requests' outputs, which are nobody's
    wait       → code or signal (the other is null), out_of_memory, memory_peak, tail (the last it wrote to
               its standard output and error); answered when the kernel has ended, at once when it already has
    signal     number (0 to 64; 0 only asks), to the kernel's process group → alive (false: nobody got it);
               one that a stopped kernel would not take (SIGINT) wakes it, too
    stacks     → nothing; payload: what each thread of the kernel is doing (faulthandler), empty where the
               kernel is none of Python's or does not answer; wakes one that is stopped
    status     → alive, memory_current, memory_peak, memory_max, pids_current, oom_kills, load (of 1
               minute), uptime, cpu (seconds), disk_used, disk_size; memory, pids and cpu are those of the
               kernel's cgroup, the disk is where its home is
    exec       argv, env?, cwd?, seconds? (at most MAX_EXEC_SECONDS), root? (false: as the kernel's user, in
               its cgroup) → code (negative: signal), truncated, timed_out; payload: the first MAX_PAYLOAD
               bytes of standard output and error. When the time is up its process group is killed
    read       path (from the kernel's home when relative), offset?, length? → size (of the file); payload
    write      path, offset? (0 cuts the file first), mode? (of a new file, 0o644); payload → size
    pull       path → nothing; from then on the connection carries that file or directory to the host, as a
               tree (tree/), and nothing else
    push       path, name? → nothing; from then on the host sends a tree, which goes to `path`, or, where that
               is a directory, to `name` in it (what is in the tree right into it without a name); at its
               end, or before when nothing of it can be used any more, there is one more answer: files,
               directories, size, failed, unlisted, problems (list of place and reason: tree/, `Tally`)
    mount      target (absolute path), read_only? → no answer: the connection is the mount's from now on, over
               which the host serves 9p2000.L. Before `start` it waits for that
    mounted    target → nothing, once it is mounted
    unmount    target → nothing; who still has files open there is not waited for
    freeze     → nothing, once all volumes are written out; who writes to them from then on waits for ever
    connect    port (1 to 65535, of the guest's loopback) → nothing, once it has accepted, or `refused`. The
               connection is the port's from then on, a stream of bytes each way with an end of its own; the
               caller sends nothing before the answer. It does not count among MAX_CONNECTIONS
    shutdown   → nothing; the machine ends when the caller has closed the connection, at most 1 s later

`read`, `write`, `pull` and `push` act with the rights of the kernel's user, on regular files (the last two on
directories, too) only, and follow no link in the last place of a path. Error codes: `unknown` operation,
`malformed` field, `failed` (the operating system's sentence), `start` (the kernel's command cannot be
executed), `started` and `not started`, `no standby`, `mount` (a mount cannot be made), `volume` (a volume
cannot be mounted), `unclean` (the target of one that is to be mounted read-only, with a journal that has to
be replayed first), `refused` (nobody listens on a port, or nobody accepts in time).

The kernel's five channels have one vsock port each, from `CHANNEL_PORTS`. The agent opens the listening
sockets before it starts the kernel and hands them down, so the host may connect as soon as `start` is
answered.
"""

from __future__ import annotations

import json
import struct

PROTOCOL_VERSION = 1

AGENT_PORT = 1024
CHANNEL_PORTS = {"shell": 6001, "iopub": 6002, "stdin": 6003, "control": 6004, "hb": 6005}
CHANNEL_FDS_VARIABLE = "SANDBOX_KERNEL_CHANNEL_FDS"
"""Environment variable of the kernel: JSON object from channel to the number of its listening socket."""

STACKS_FD_VARIABLE = "SANDBOX_KERNEL_STACKS_FD"
"""Environment variable of the kernel: number of the descriptor that its stacks are written to."""
STACKS_SIGNAL = 62
"""The real-time signal that has an ipykernel write the stacks of its threads."""
MAX_STACKS = 64 * 1024
"""Bytes of stacks."""

STANDBY_VARIABLE = "SANDBOX_KERNEL_STANDBY"
"""Environment variable of a template's kernel: JSON object with `fd` and `modules` (guest/standby.py)."""
TEMPLATE_WORD = "sandbox.template="
"""Word of the guest kernel's command line that asks for a template: JSON in hexadecimal, with `modules` and,
where there is a network device, `network` as `configure` has it."""
WARM = "SANDBOX-KERNEL-TEMPLATE-WARM"
"""Said on the console when the VM may be saved. The agent then reads lines from the console: the first one
that comes is sent after a restore, when the vsock device has been plugged in."""
JIFFIES = "SANDBOX-KERNEL-CLOCK-JIFFIES"
"""Said before that by a guest that has found no clock but its own ticks: its clones would tick for ever."""

HEADER = struct.Struct(">3sBII")
MAGIC = b"SKA"
MAX_JSON = 256 * 1024
"""Bytes of one JSON object: the environment and argv of a kernel fit, a flood does not."""
MAX_PAYLOAD = 4 * 1024 * 1024
"""Bytes of one payload; larger files travel in pieces (`offset`)."""
RELAY_IDENTITY = b"sandbox-kernel"
"""ZMQ routing id of the host's relay; the kernel's launcher takes it off what the kernel sees."""
MAX_CONNECTIONS = 16
"""Connections the agent serves at a time; one more is closed at once."""
MAX_ENTROPY = 512
"""Bytes of entropy in one request."""
MAX_EXEC_SECONDS = 300.0
"""Seconds that a program started by `exec` may take."""

MAX_COPIES = 4
"""Trees on their way at a time."""
COPY_SECONDS = 60.0
"""Seconds that a piece of a tree may take."""

MAX_MOUNTS = 16
"""Mounts in a guest at a time."""
MAX_VOLUMES = 8
"""Volumes in a guest."""
MOUNT_ROOT = "/share"
"""The directory that a mount asks its server for (9p2000.L, `aname`)."""
MOUNT_MESSAGE = 64 * 1024
"""Bytes of one message of 9p (`msize`): as many as the server takes."""
MAX_PORT_CONNECTIONS = 96
"""Connections to ports of the guest at a time; one more is refused."""
KERNEL_USER = 1000
"""Numeric id of the kernel's user and group, to which a mounted directory belongs."""

OPERATIONS = frozenset(
    {
        *("hello", "configure", "start", "rehearse", "wait", "signal", "status"),
        *("stacks", "exec", "read", "write", "shutdown", "mount", "mounted", "unmount", "freeze"),
        *("connect", "pull", "push"),
    }
)


STANDBY_ARGV = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
"""The command of the kernel that stands by in a template."""
_READ_AT_START = ("PYTHON", "LD_", "IPYTHON", "JUPYTER_", "MALLOC_", "GLIBC_")
"""Beginnings of variables that an interpreter or its kernel reads when it starts, and never again."""


def can_adopt(argv: list[str], env: dict[str, str]) -> bool:
    """Whether the kernel that stands by in a template can become the one that `start` asks for."""
    return argv == STANDBY_ARGV and not any(name.startswith(_READ_AT_START) for name in env)


class FrameError(Exception):
    """The bytes are not a frame of this protocol; the connection cannot go on."""


def pack(message: dict[str, object], payload: bytes = b"") -> bytes:
    """One frame, ready to send.

    Args:
        message: the JSON object, at most MAX_JSON bytes once encoded.
        payload: raw bytes behind it, at most MAX_PAYLOAD.

    Raises:
        FrameError: one of them is too long.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_JSON:
        raise FrameError(f"The message has {len(body)} bytes and the limit is {MAX_JSON}.")
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"The payload has {len(payload)} bytes and the limit is {MAX_PAYLOAD}.")
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, len(body), len(payload)) + body + payload


def parse_header(header: bytes) -> tuple[int, int]:
    """Lengths in bytes of the JSON object and of the payload that follow `header` (HEADER.size bytes).

    Raises:
        FrameError: wrong magic, another version, or a length over its limit.
    """
    magic, version, json_length, payload_length = HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError(f"A frame begins with {magic!r} instead of {MAGIC!r}.")
    if version != PROTOCOL_VERSION:
        raise FrameError(
            f"The peer speaks version {version} of the agent protocol and this side {PROTOCOL_VERSION}; "
            "rebuild the image with `sandbox-kernel image build`."
        )
    if json_length > MAX_JSON or payload_length > MAX_PAYLOAD:
        raise FrameError(
            f"A frame announces {json_length} + {payload_length} bytes and the limits are "
            f"{MAX_JSON} + {MAX_PAYLOAD}."
        )
    return json_length, payload_length


def parse_message(body: bytes) -> dict[str, object]:
    """The JSON object of a frame.

    Raises:
        FrameError: the bytes are not a JSON object, or are nested too deeply to parse.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError("A frame's message is not JSON.") from error
    if not isinstance(message, dict):
        raise FrameError(f"A frame's message is a JSON {type(message).__name__}, not an object.")
    return message
