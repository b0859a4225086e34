"""The pinned suites, the committed lists that go with them, and what a suite's process is given."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.conformance import baseline, isolation, leftovers, lock, outcome
from tests.conformance.baseline import Score
from tests.conformance.isolation import Choice
from tests.conformance.lock import Suite
from tests.conformance.plugin import lifted

SUITES = lock.load()


def suite(name: str) -> Suite:
    return next(suite for suite in SUITES if suite.name == name)


def choice(**changes: object) -> Choice:
    made = Choice(target="microvm", keyword="", timeout=0.0, patience=0.0, output=Path("out"))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_every_source_is_pinned_by_version_and_hash() -> None:
    for sdist in {suite.sdist for suite in SUITES}:
        assert re.fullmatch(r"[\w]+==\d+(\.\d+)+ --hash=sha256:[0-9a-f]{64}", sdist.requirement)


def test_the_environment_has_the_versions_whose_tests_run() -> None:
    pins = set((lock.FOLDER / "requirements.lock").read_text().splitlines())
    for sdist in {suite.sdist for suite in SUITES}:
        assert f"{sdist.name.replace('_', '-')}=={sdist.version}" in pins


def test_a_suite_of_an_unpinned_source_is_refused() -> None:
    with pytest.raises(KeyError):
        lock.parse('sdist = []\n[[suite]]\nname = "a"\nsdist = "b"\ntests = ["t"]')


def test_quick_selects_what_the_test_target_promises() -> None:
    quick = [suite.name for suite in lock.select(SUITES, (), quick=True)]
    assert quick == ["jupyter_kernel_test", "ipykernel.test_message_spec"]


def test_a_project_selects_all_its_suites_and_a_name_only_one() -> None:
    assert len(lock.select(SUITES, ("ipykernel",), quick=False)) == 5
    assert lock.select(SUITES, ("ipykernel.test_async", "nbclient"), quick=False) == (
        suite("ipykernel.test_async"),
        suite("nbclient"),
    )


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(LookupError, match=r"no suite 'ipy'; there are jupyter_kernel_test, "):
        lock.select(SUITES, ("ipy",), quick=False)


def test_the_committed_lists_speak_of_suites_that_exist() -> None:
    names = {suite.name for suite in SUITES}
    entries = outcome.parse_expectations((lock.FOLDER / "expected_failures.toml").read_text())
    assert {entry.suite for entry in entries} <= names
    assert set(baseline.load()) == names


def test_a_baseline_survives_the_trip_through_its_file() -> None:
    scores = {"a.b": Score(1, 2, 3, 4.5), "c": Score(0, 0, 0, 0.0)}
    assert baseline.read(baseline.write(scores)) == scores


def test_a_suite_sees_the_users_images_but_no_folder_to_write_in() -> None:
    base = {"HOME": "/h", "JUPYTER_PATH": "/j", "PYTHONPATH": "/p", "PATH": "/b", "XDG_DATA_HOME": "/data"}
    folder = Path("/tmp/skc-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", "/data")
        patch.setenv("XDG_CACHE_HOME", "/cache")
        env = isolation.environment(base, folder, Path("/env/bin/python"), "microvm", "default")
    assert (env["XDG_DATA_HOME"], env["XDG_CACHE_HOME"]) == ("/data", "/cache")
    assert env["PATH"] == "/env/bin:/b"
    assert env["JUPYTER_DEFAULT_PROVISIONER_NAME"] == "microvm-provisioner"
    assert not {"JUPYTER_PATH", "PYTHONPATH"} & set(env)
    for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        assert Path(env[name]).is_relative_to(folder)


def test_the_baseline_runs_kernels_under_jupyters_own_provisioner() -> None:
    env = isolation.environment({}, Path("/tmp/skc-1"), Path("/env/bin/python"), "stock", "default")
    assert env["JUPYTER_DEFAULT_PROVISIONER_NAME"] == "local-provisioner"
    assert env["CONFORMANCE_KERNEL"] == "python3"


def test_a_suites_own_time_out_holds_unless_another_is_asked_for() -> None:
    python, junit = Path("/env/bin/python"), Path("j.xml")
    for asked, seconds in ((0.0, f"{suite('nbclient').timeout:g}"), (7.5, "7.5")):
        arguments = isolation.arguments(suite("nbclient"), python, choice(timeout=asked), junit)
        assert arguments[arguments.index("--timeout") + 1] == seconds


def test_a_keyword_reaches_pytest() -> None:
    arguments = isolation.arguments(
        suite("nbclient"), Path("/e/bin/python"), choice(keyword="async"), Path("j")
    )
    assert arguments[-2:] == ["-k", "async"]


def test_tests_inside_a_package_run_as_installed() -> None:
    arguments = isolation.arguments(suite("papermill"), Path("/e/bin/python"), choice(), Path("j"))
    assert arguments[:2] == ["--pyargs", "papermill.tests.test_execute"]
    assert arguments[arguments.index("--rootdir") + 1].startswith("/e/lib/")


@pytest.mark.parametrize(
    ("timeout", "wait"), [(None, None), (0.0, 0.0), (0.2, 0.2), (0.499, 0.499), (0.5, 2.5), (15, 75)]
)
def test_only_waits_that_are_patience_are_lifted(timeout: float | None, wait: float | None) -> None:
    assert lifted(timeout, 5) == wait


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("/usr/bin/qemu-system-x86_64 -nodefaults", True),
        ("bwrap --unshare-all", True),
        ("python -P -m sandbox_kernel.supervisor 5 99", True),
        ("/bin/sh -c … sandbox-kernel-guardian /run/x", True),
        ("python -m ipykernel_launcher -f kernel.json", False),
    ],
)
def test_a_micro_vms_processes_are_known_by_their_command_lines(command: str, ours: bool) -> None:
    assert leftovers.is_ours(command) is ours
