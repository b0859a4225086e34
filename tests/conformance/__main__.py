"""`python -m tests.conformance`: gets the suites, runs them, exits 1 when something is not as listed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from sandbox_kernel import paths
from tests.conformance import (
    baseline,
    environment,
    guest,
    isolation,
    leftovers,
    lock,
    outcome,
    report,
    sources,
)
from tests.conformance.isolation import Choice
from tests.conformance.leftovers import Leftovers
from tests.conformance.lock import Suite
from tests.conformance.outcome import Expectation, Verdict


@click.command()
@click.option("--suite", "names", multiple=True, help="Only this suite, or the suites of this project.")
@click.option("--quick", is_flag=True, help="Only the suites that `make test` runs.")
@click.option("--target", type=click.Choice(isolation.TARGETS), default="microvm", show_default=True)
@click.option("-k", "keyword", default="", help="Only tests that pytest's -k selects.")
@click.option(
    "--timeout-per-test", "timeout", type=float, default=0.0, help="Seconds; each suite has its own."
)
@click.option(
    "--patience", type=float, default=0.0, help="Factor on the suites' waits; each suite has its own."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results here.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for logs, JUnit files and the logs of failed VMs.  [default: .cache/conformance/TARGET]",
)
@click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="An interpreter that has the suites' packages; without, they are installed into an environment.",
)
@click.option("--record-baseline", is_flag=True, help="Write what was scored to baseline.toml (stock only).")
@click.option("--list", "only_list", is_flag=True, help="Print the suites and exit.")
def main(
    names: tuple[str, ...],
    quick: bool,
    target: str,
    keyword: str,
    timeout: float,
    patience: float,
    json_file: Path | None,
    output: Path | None,
    python: Path | None,
    record_baseline: bool,
    only_list: bool,
) -> None:
    """Runs the test suites of Jupyter's own projects against a kernel in a micro-VM."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        suites = lock.select(lock.load(), names, quick)
        entries = outcome.parse_expectations((lock.FOLDER / "expected_failures.toml").read_text())
    except (LookupError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if record_baseline and (target != "stock" or keyword):
        raise click.UsageError("--record-baseline wants --target stock and all tests of a suite.")
    if only_list:
        for suite in suites:
            console.print(f"{suite.name}  {suite.sdist.name} {suite.sdist.version}", highlight=False)
        return
    choice = Choice(
        target, keyword, timeout, patience, output or environment.CHECKOUT / ".cache" / "conformance" / target
    )
    stock = baseline.load()
    leftovers.become_reaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C does: by way of the clean-up
    try:
        verdicts, left = _run(suites, entries, choice, python, console)
    except (sources.SourceError, environment.SuiteEnvironmentError) as error:
        raise click.ClickException(str(error)) from error
    console.print(report.table(verdicts, stock, target))
    report.say(console, report.complaints(verdicts, left))
    if json_file is not None:
        json_file.write_text(json.dumps(report.document(verdicts, left, stock, target), indent=2) + "\n")
    if record_baseline:
        scores = stock | {name: baseline.score(verdict) for name, verdict in verdicts.items()}
        baseline.FILE.write_text(baseline.write(scores))
    sys.exit(0 if report.good(verdicts, left) else 1)


def _run(
    suites: Sequence[Suite],
    entries: Sequence[Expectation],
    choice: Choice,
    python: Path | None,
    console: Console,
) -> tuple[dict[str, Verdict], dict[str, Leftovers]]:
    """Runs the suites one after the other, with a line for each; verdicts and leftovers by suite."""
    cache = paths.cache_dir() / "conformance"
    verdicts: dict[str, Verdict] = {}
    left: dict[str, Leftovers] = {}
    with environment.alone(cache):
        with console.status("Getting the suites"):
            archives = sources.fetch({suite.sdist for suite in suites}, cache / "sources")
            python = python or environment.prepare(cache / "environments")
        for suite in suites:
            with console.status(f"{suite.name} …"):
                image = guest.image(suite.guest) if choice.target != "stock" else guest.DEFAULT
                ran = isolation.run(suite, archives[suite.sdist], python, choice, image)
            kind = "stock" if choice.target == "stock" else "microvm"
            listed = [e for e in entries if e.suite == suite.name and e.target in (kind, "any")]
            verdict = outcome.judge(ran.results, listed, ran.seconds, whole=not choice.keyword)
            verdicts[suite.name], left[suite.name] = verdict, ran.left
            word = "ok" if verdict.good and ran.left.clean else "NOT OK"
            said = f"{suite.name}: {word}, {report.shown(baseline.score(verdict))}, log in {ran.log}"
            for line in (said, *(f"  the suite itself left: {command}" for command in ran.left.strangers)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    return verdicts, left


if __name__ == "__main__":
    main()
