"""`python -m tests.fuzz TARGET`: runs one target under a coverage-guided fuzzer (atheris, that is libFuzzer).

`all` runs one after the other, each with the same limit, and says of each how it went.

Without `--runs` and `--seconds` it goes on until it is stopped or has a finding: an exception that the target
does not expect, a run of more than 10 seconds, memory beyond a bound. A finding is written to
`.cache/fuzz/TARGET-…`, and `--replay` runs such a file without the fuzzer. What reaches new code is kept in
`.cache/fuzz/TARGET` and read again next time; `--minimise` makes the repository's corpus anew from it.
Options behind `--` are libFuzzer's.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from sandbox_kernel.resources import guest_dir
from tests.fuzz import corpus, targets

_OPTIONS = ("-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1", "-max_len=4096")
_SHORT_FIRST = "-entropic_scale_per_exec_time=1"
"""Runs that take long are changed less often, in proportion (to 30 times less), but none never."""
_BLIND = ("vsock", "relay")
"""Targets that reach the same whether or not libFuzzer sees what is compared, in less time if not."""
_MISSING = (
    "The fuzzer is missing: pip install atheris (it has wheels for CPython 3.11 to 3.13 on x86-64 Linux)."
)


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, options = _words(sys.argv[1:at]), sys.argv[at + 1 :]
    if words.target == "all":
        _all(sys.argv[2:])
        return
    sys.path.append(str(guest_dir()))
    if words.replay:
        with targets.load(words.target).fuzzing() as run:
            for file in words.replay:
                run(file.read_bytes())
    elif words.minimise:
        _minimise(words.target)
    elif words.again:
        _fuzz(words.target, options)
    else:
        limits = [f"-runs={words.runs}", f"-max_total_time={words.seconds}"]
        folders = [str(corpus.found(words.target)), str(corpus.kept(words.target))]
        for folder in folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
        _fuzz(words.target, [*limits, *options, *folders])


def _words(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", epilog="Options behind -- are libFuzzer's own."
    )
    parser.add_argument("target", choices=("all", *targets.NAMES))
    parser.add_argument("--runs", type=int, default=-1, help="end after so many")
    parser.add_argument("--seconds", type=int, default=0, help="end after that time")
    parser.add_argument("--minimise", action="store_true", help="make the kept corpus anew")
    parser.add_argument("--replay", type=Path, nargs="+", help="run these files, without the fuzzer")
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)  # libFuzzer starts itself
    return parser.parse_args(given)


def _all(limits: list[str]) -> None:
    for target in targets.NAMES:
        log = corpus.found(target).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            ended = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", target, *limits],
                stdout=output,
                stderr=output,
                check=False,
            )
        lines = log.read_text(errors="replace").splitlines()
        if ended.returncode:
            sys.exit("\n".join([*lines[-40:], f"{target}: see {log}"]))
        print(f"{target}: {next(line for line in reversed(lines) if line.startswith('Done'))}", flush=True)


def _fuzz(target: str, options: list[str]) -> None:
    """Becomes the fuzzer; does not return."""
    try:
        import atheris

        from tests.fuzz import counters
    except ModuleNotFoundError:
        sys.exit(_MISSING)
    guest = [file.stem for file in (*guest_dir().glob("*.py"), *guest_dir().glob("agent_*/"))]
    with counters.instrumenting(["sandbox_kernel", *guest], target not in _BLIND):
        module = targets.load(target)
    own = [*_OPTIONS, _SHORT_FIRST, f"-artifact_prefix={corpus.found(target)}-"]
    corpus.save(corpus.found(target), module.seeds())
    with module.fuzzing() as run:

        def counted(data: bytes) -> None:
            run(data)
            counts.hand_over()

        atheris.Setup([_itself(target), *own, *options], counted)
        counts = counters.Counters()
        atheris.Fuzz()


def _itself(target: str) -> str:
    """A program that is this one, which libFuzzer starts again to minimise."""
    program = corpus.found(target).parent / f"again-{target}"
    words = (sys.executable, "-m", "tests.fuzz", target, "--again", "--")
    program.write_text(f'#!/bin/sh\ncd {shlex.quote(str(corpus.ROOT))} && exec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)
    return str(program)


def _minimise(target: str) -> None:
    """Replaces the kept corpus by the fewest runs that reach all that it, the seeds and the finds reach."""
    found, kept = corpus.found(target), corpus.kept(target)
    corpus.save(found, targets.load(target).seeds())
    corpus.save(found, corpus.runs(kept))
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    words = ["--again", "--", "-set_cover_merge=1", str(kept), str(found)]
    # A new interpreter: in this one the target is imported, and the fuzzer would not see into it.
    os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", target, *words])


if __name__ == "__main__":
    main()
