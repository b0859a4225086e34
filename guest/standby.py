"""Makes the process that becomes a template's kernel: initialised and warm, waiting to be told whose it is.

A template is a VM that was saved with a kernel in it. Everything that takes long has been done by then:
imports, IPython's shell, a first cell. What differs from one clone to the next arrives after the restore, as
one line of JSON on a descriptor from the agent, before any request:

    ← {"ready": true}                                                   warm; the VM may be saved
    → {"env": {…}, "cwd": … or null, "connection": {"key": …, …}, "rehearsal": false}
    ← {"ready": true}                                                   this is a kernel of its own now

A rehearsal is the same with an identity that nobody uses, and with the warm-up after it: where instructions
are emulated, a clone translates all code anew, which one that waits for its user can have done before. The
kernel goes on standing by then, for any number of further lines until one is no rehearsal.

Rules. No user code runs before that, and nothing of the warm-up is left for it to see. No secret and no
identity of the template lives on: session key and ids, and every generator in this process that drew from the
kernel's before, are made anew. What stays the same in all clones is the seed of `hash` for text and bytes,
which an interpreter takes once, at its start, and the process id.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.session import Session, new_id

if TYPE_CHECKING:
    import asyncio

    from ipykernel.kernelapp import IPKernelApp

_PATIENCE = 60_000
"""Milliseconds that a warm-up request may take, under emulation on a busy host."""
_LONGEST_LINE = 1 << 20
_PIECE = 1 << 14
_LATER = 5.0
_ENTROPY = 64
_OWN = os.path.dirname(os.path.abspath(__file__))
_INTERRUPTED = (
    *("ipykernel.iostream", "ipykernel.zmqshell", "ipykernel.ipkernel", "ipykernel.comm.comm"),
    *("comm.base_comm", "jupyter_client.session", "jupyter_client.jsonutil", "zmq.sugar.socket", "threading"),
    *("IPython.core.display_functions", "IPython.core.formatters", "traitlets.traitlets"),
    *("json", "json.encoder", "dateutil.tz.tz"),
)
"""Where an interrupt of a flood of output falls. What explains their lines is 26 MiB; all clones share it."""
_COMPILED = "zmq/backend/cython/_zmq.py"
"""What pyzmq's compiled part calls its source, which a search along `sys.path` finds."""
_preloaded: list[str] = []


def arm(fd: int, modules: list[str]) -> None:
    """Makes the application that will start in this process stand by.

    Args:
        fd: socket to the agent, owned from now on.
        modules: imported before anything else of the warm-up; one that fails is passed over, as the cell
            that needs it will tell why.
    """
    from ipykernel.kernelapp import IPKernelApp

    start: Any = IPKernelApp.start

    def start_and_stand_by(app: IPKernelApp) -> None:
        IPKernelApp.start = start  # type: ignore[method-assign]
        standby = Standby(app, socket.socket(fileno=fd))
        threading.Thread(target=standby.prepare, args=(modules,), daemon=True).start()
        start(app)

    IPKernelApp.start = start_and_stand_by  # type: ignore[method-assign]


class Standby:
    """A kernel's waiting for its order: in its event loop, as it waits for requests.

    A thread warms it up from outside, which is over when the VM is saved.
    """

    def __init__(self, app: IPKernelApp, line: socket.socket) -> None:
        self._app, self._line = app, line

    def prepare(self, modules: list[str]) -> None:
        """Makes the kernel warm; a thread's work."""
        with _complete():
            _preloaded.extend(modules)
            for module in modules:
                _in_main_thread(self._app, lambda name=module: _preload(name))
            _remember_expressions()
            self._warm_up()
            _in_main_thread(self._app, _read_sources)
            _in_main_thread(self._app, _immortalise)
            _in_main_thread(self._app, self._wait)

    def _wait(self) -> None:
        loop: asyncio.BaseEventLoop = self._app.io_loop.asyncio_loop  # type: ignore[attr-defined]
        loop.add_reader(self._line.fileno(), self._obey)
        self._say_ready()

    def _obey(self) -> None:
        with _complete():
            order = json.loads(_read_line(self._line))
            become(self._app, order)
            if order["rehearsal"]:
                threading.Thread(target=self._rehearse, daemon=True).start()
                return
            self._say_ready()
            # To be done by every clone, but not while somebody waits for its kernel.
            self._app.io_loop.asyncio_loop.call_later(_LATER, self._leave)  # type: ignore[attr-defined]

    def _leave(self) -> None:
        self._app.io_loop.asyncio_loop.remove_reader(self._line.fileno())  # type: ignore[attr-defined]
        self._line.close()

    def _rehearse(self) -> None:
        with _complete():
            self._warm_up()
            self._say_ready()

    def _warm_up(self) -> None:
        _warm_up(self._app)
        _in_main_thread(self._app, _settle)

    def _say_ready(self) -> None:
        self._line.sendall(b'{"ready": true}\n')


@contextlib.contextmanager
def _complete() -> Iterator[None]:
    """Half a change of identity is none: the process ends, and the agent starts another kernel."""
    try:
        yield
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def _read_line(line: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        piece = line.recv(_PIECE)
        if not piece or len(text) > _LONGEST_LINE:
            os._exit(0)  # the agent has no use for this kernel
        text += piece
    return text


def _in_main_thread(app: IPKernelApp, call: Any) -> None:
    """Runs `call` in the kernel's event loop and waits for it; raises what it raises."""
    done = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        done.set()

    while getattr(app, "io_loop", None) is None:
        threading.Event().wait(0.01)  # the main thread has not reached its loop yet
    app.io_loop.add_callback(run)
    done.wait()
    if errors:
        raise errors[0]


def _preload(module: str) -> None:
    try:
        __import__(module)
    except BaseException as error:
        print(f"preload {module}: {error!r}", file=sys.__stderr__)


def _warm_up(app: IPKernelApp) -> None:
    """Sends a kernel its first requests, from inside, as a client would."""
    import zmq

    session = Session(key=app.session.key)
    with zmq.Context() as context, context.socket(zmq.DEALER) as shell:
        shell.linger = 0
        shell.connect(f"ipc://{app.ip}-{app.shell_port}")

        def ask(kind: str, **content: Any) -> None:
            session.send(shell, kind, content)
            if not shell.poll(_PATIENCE):
                raise TimeoutError(f"no reply to {kind}")
            shell.recv_multipart()

        options = {"silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        ask("kernel_info_request")
        ask("execute_request", code="pass", **options)
        ask("execute_request", code="print(end='')", **options)
        ask("execute_request", code="", **(options | {"silent": True}))
        ask("comm_info_request")
    shell_of_user = app.kernel.shell
    _in_main_thread(app, lambda: shell_of_user.display_formatter.format(1))
    _in_main_thread(app, lambda: _explain(shell_of_user))


def _explain(shell: Any) -> None:
    """What the first error of a kernel takes seconds for: the modules that explain it."""
    try:
        raise ValueError("warm-up")
    except ValueError:
        shell.InteractiveTB.structured_traceback(*sys.exc_info())


def _read_sources() -> None:
    """Once, and not in a rehearsal: to look at the lines again is to write to them, in each clone."""
    from stack_data.core import Source

    files = [getattr(sys.modules.get(name), "__file__", None) for name in _INTERRUPTED]
    for file in (*files, _COMPILED):
        if file is not None:
            source: Any = Source.for_filename(file)  # which keeps it
            _ = source.pieces


def _remember_expressions() -> None:
    """stack_data has pygments make a new lexer of Python for each frame, each time of the same words."""
    lexer: Any = importlib.import_module("pygments.lexer")
    optimise = functools.cache(lexer.regex_opt)

    def regex_opt(strings: Iterable[str], prefix: str = "", suffix: str = "") -> str:
        return str(optimise(tuple(strings), prefix, suffix))

    lexer.regex_opt = regex_opt


def _settle() -> None:
    """Nothing that lives as long as the process shall be looked at, or copied, ever again."""
    gc.collect()
    gc.freeze()


def _immortalise() -> None:
    """What runs shall not be written to by running."""
    sys.path.insert(0, _OWN)
    import immortal

    sys.path.remove(_OWN)
    del sys.modules["immortal"]
    gc.unfreeze()  # what is frozen is not found
    immortal.immortalise()
    _settle()


def become(app: IPKernelApp, order: dict[str, Any]) -> None:
    """Makes the kernel in this process the one that `order` describes."""
    os.environ.update(order["env"])
    cwd = order["cwd"]
    if cwd is not None:
        os.chdir(cwd)
        app.kernel.shell.history_manager.dir_hist[:] = [Path(cwd)]
    _take_identity(app, order["connection"])
    _forget()
    _reseed()


def _take_identity(app: IPKernelApp, connection: dict[str, Any]) -> None:
    session, kernel = app.session, app.kernel
    session.session = new_id()
    scheme = connection.get("signature_scheme", session.signature_scheme)
    if scheme != session.signature_scheme:
        session.signature_scheme = scheme
    session.key = connection["key"].encode()
    session.digest_history.clear()
    session.message_count = 0
    kernel.ident = new_id()
    kernel.shell.displayhook.topic = kernel._topic("execute_result")


def _forget() -> None:
    """What modules remember of a machine that this one no longer is."""
    platform = sys.modules.get("platform")
    if platform is not None:
        platform._uname_cache = None  # type: ignore[attr-defined]


def _reseed() -> None:
    """Every generator of this process whose state the template has; the guest's own has been reseeded."""
    random.seed()
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    uuid = sys.modules.get("uuid")
    if uuid is not None:
        uuid._last_timestamp = None  # type: ignore[attr-defined]
        uuid._node = None  # type: ignore[attr-defined]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    # OpenSSL makes its generator when it is first asked, which nothing in a warm-up does; a module may have.
    ssl = sys.modules.get("ssl") if _preloaded else None
    if ssl is not None:
        ssl.RAND_add(os.urandom(_ENTROPY), float(_ENTROPY))
