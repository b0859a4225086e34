"""One suite in a process and folders of its own.

Everything that Jupyter, IPython and this package write is inside the suite's folder: home, Jupyter's data,
configuration and runtime, XDG state (the VMs' logs) and XDG runtime (the VMs' sockets, hence a short path).
Two things are the real user's and are named to the suite by absolute path, since `HOME` is not: XDG data,
where the images are, and XDG cache, where the accelerator's verdict is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sandbox_kernel import paths
from tests.conformance import leftovers, outcome
from tests.conformance.leftovers import Leftovers
from tests.conformance.lock import FOLDER, Suite
from tests.conformance.outcome import Result
from tests.conformance.sources import unpack

_DROPPED = ("JUPYTER", "JPY_", "IPYTHON", "IPYKERNEL", "PYTHON", "PYTEST", "VIRTUAL_ENV", "COV_", "MPL")
_PROVISIONER = {
    "microvm": "microvm-provisioner",
    "cold": "microvm-provisioner",
    "pooled": "microvm-provisioner",
    "stock": "local-provisioner",
}
_MICROVM = "python3-microvm"
_KERNEL = {"microvm": _MICROVM, "cold": _MICROVM, "pooled": _MICROVM, "stock": "python3"}
_WAITING = 2
_POOL_PATIENCE = 60.0
TARGETS = tuple(_PROVISIONER)


@dataclass(frozen=True)
class Choice:
    """What was asked for on the command line.

    Attributes:
        target: `microvm` (restored), `cold` (a micro-VM that boots), `pooled` (from a pool, as far as its VMs
            go; the others are forked by it and restored) or `stock`.
        keyword: pytest's `-k`; empty for all tests.
        timeout: seconds per test instead of the suite's own; 0 for the suite's own.
        patience: factor on client waits instead of the suite's own; 0 for the suite's own.
        output: folder for logs and reports.
    """

    target: str
    keyword: str
    timeout: float
    patience: float
    output: Path


@dataclass(frozen=True)
class Run:
    """How a suite ran: its results, the seconds it took, what it left, and its log."""

    results: tuple[Result, ...]
    seconds: float
    left: Leftovers
    log: Path


def run(suite: Suite, archive: Path, python: Path, choice: Choice, image: str) -> Run:
    """Runs one suite and waits for its end or its deadline.

    Args:
        suite: which.
        archive: its source distribution.
        python: the interpreter of the suites' environment.
        choice: what was asked for.
        image: name of the guest image.
    """
    choice.output.mkdir(parents=True, exist_ok=True)
    log, reports = (choice.output / f"{suite.name}.{end}" for end in ("log", "jsonl"))
    reports.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="skc-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for name in ("run", "home", "jupyter", "state", "sources"):
            (folder / name).mkdir(mode=0o700)
        root = unpack(archive, suite.sdist, folder / "sources")
        for name in suite.beside:
            shutil.copy(FOLDER / name, root)
        junit = choice.output / f"{suite.name}.xml"
        command = [str(python), "-P", str(FOLDER / "plugin.py"), str(reports.resolve())]
        command += [
            str(choice.patience or suite.patience),
            *arguments(suite, python, choice, junit.resolve()),
        ]
        variables = environment(os.environ, folder, python, choice.target, image)
        variables |= {f"SANDBOX_KERNEL_{key.upper()}": value for key, value in suite.config.items()}
        started = time.monotonic()
        with log.open("w") as output, _pool(python, variables, choice.target, output):
            process = subprocess.Popen(
                command,
                cwd=root,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                process.wait(suite.deadline)
            except subprocess.TimeoutExpired:
                output.write(f"\nThe suite's deadline of {suite.deadline:g} s is over.\n")
            finally:
                _end(process)
        seconds = time.monotonic() - started
        left = leftovers.collect(folder / "run")
        if choice.target != "stock" and (vms := folder / "state" / "sandbox-kernel" / "vms").is_dir():
            shutil.copytree(vms, choice.output / f"{suite.name}.vms", dirs_exist_ok=True)
    lines = reports.read_text().splitlines() if reports.exists() else []
    return Run(outcome.read_reports(lines), seconds, left, log)


@contextmanager
def _pool(python: Path, variables: Mapping[str, str], target: str, log: TextIO) -> Iterator[None]:
    """A pool of the suite's own, for the target that wants one; what it gave stands in the log."""
    if target != "pooled":
        yield
        return
    command = [str(python), "-P", "-m", "sandbox_kernel.cli.main", "pool"]
    pool = subprocess.Popen(
        [*command, "--size", f"{_MICROVM}={_WAITING}"], env=variables, stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + _POOL_PATIENCE
        while _said(command, variables).count(" ready ") < _WAITING:
            if pool.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("The pool of the suite did not come up; its log is the suite's.")
            time.sleep(0.2)
        yield
        log.write(f"\nThe pool: {_said(command, variables)}")
        log.flush()
    finally:
        pool.terminate()
        pool.wait(_POOL_PATIENCE)


def _said(command: list[str], variables: Mapping[str, str]) -> str:
    """What `pool status` says."""
    done = subprocess.run([*command, "status"], env=variables, capture_output=True, text=True, check=False)
    return done.stdout


def arguments(suite: Suite, python: Path, choice: Choice, junit: Path) -> list[str]:
    """pytest's arguments; what they set overrides the suite's own configuration for each target alike."""
    chosen = [
        *(["--pyargs", *suite.tests] if suite.installed else suite.tests),
        *suite.beside,
        *("-p", "no:cacheprovider", "--color=no", "-q"),
        *("-c", "pyproject.toml", "--rootdir", str(packages(python)) if suite.installed else "."),
        # pytest-asyncio warns when it is not set, and suites turn warnings into errors.
        *("-o", "asyncio_default_fixture_loop_scope=function"),
        # The other method ends the whole process, and with it the tests that were still to come.
        *("--timeout-method", "signal", "--timeout", f"{choice.timeout or suite.timeout:g}"),
        *("--junitxml", str(junit)),
        *(word for warning in suite.warnings for word in ("-W", warning)),
    ]
    return [*chosen, "-k", choice.keyword] if choice.keyword else chosen


def packages(python: Path) -> Path:
    """Where the packages of the virtual environment that `python` belongs to are installed."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(python.parent.parent)}))


def environment(
    base: Mapping[str, str], folder: Path, python: Path, target: str, image: str
) -> dict[str, str]:
    """The suite's variables: the caller's without what steers Jupyter or Python, and folders of its own."""
    kept = {name: value for name, value in base.items() if not name.startswith(_DROPPED)}
    return kept | {
        "PATH": f"{python.parent}{os.pathsep}{base.get('PATH', os.defpath)}",
        "HOME": str(folder / "home"),
        "IPYTHONDIR": str(folder / "home" / "ipython"),
        "MPLCONFIGDIR": str(folder / "home" / "matplotlib"),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter" / "config"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter" / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter" / "runtime"),
        "JUPYTER_DEFAULT_PROVISIONER_NAME": _PROVISIONER[target],
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_DATA_HOME": str(paths.data_dir().parent),
        "XDG_CACHE_HOME": str(paths.cache_dir().parent),
        "CONFORMANCE_KERNEL": _KERNEL[target],
        "SANDBOX_KERNEL_IMAGE": image,
        "SANDBOX_KERNEL_START": "cold" if target == "cold" else "auto",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the suite's own process group, which this module started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
