"""Files and directories copied into a kernel that runs, and out of it, with the command that people use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.microvm import READY, Kernel, microvm, until

COMMAND = str(Path(sys.executable).with_name("sandbox-kernel"))
SEED = """
import hashlib, os
def digest(path): return hashlib.sha256(open(path, 'rb').read()).hexdigest()
def tree(top): return sorted(os.path.relpath(os.path.join(at, n), top)
                             for at, folders, files in os.walk(top) for n in folders + files)
"""


@pytest.fixture(scope="module")
def kernel(installed: None) -> Iterator[Kernel]:
    with microvm(disk=64) as running:
        running.run(SEED)
        yield running


@pytest.fixture(scope="module")
def vm(kernel: Kernel) -> str:
    name: str = kernel.manager.provisioner.report["id"]
    return name


def cp(*arguments: str, status: int = 0) -> str:
    """What the command says."""
    done = subprocess.run([COMMAND, "cp", *arguments], capture_output=True, text=True, timeout=READY)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    return done.stderr


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_arrives_whole_both_ways(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(9_000_001))
    assert cp(f"{tmp_path}/large", f"{vm}:") == "1 file, 9.0 MB\n"
    assert kernel.run("print(digest('large'))") == digest(tmp_path / "large")
    assert cp(f"{vm[:6]}:large", f"{tmp_path}/back") == "1 file, 9.0 MB\n"
    assert digest(tmp_path / "back") == digest(tmp_path / "large")
    kernel.run("os.unlink('large')")


def test_a_tree_arrives_as_it_was_both_ways(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "many").mkdir()
    for number in range(500):
        (source / "many" / f"ü {number}").write_text(str(number))
    (source / "script").write_text("#!/bin/sh\necho run\n")
    (source / "script").chmod(0o750)
    os.utime(source / "script", ns=(1, 1_600_000_000_000_000_000))
    assert cp(str(source), f"{vm}:/tmp/there") == "501 files, 1.4 kB\n"
    seen = kernel.run("s = os.stat('/tmp/there/script'); print(oct(s.st_mode), s.st_uid, s.st_mtime_ns)")
    assert seen == "0o100750 1000 1600000000000000000"
    assert kernel.run("import subprocess; print(subprocess.check_output('/tmp/there/script'))") == "b'run\\n'"
    wanted = sorted(str(path.relative_to(source)) for path in source.rglob("*"))
    assert kernel.run("print(tree('/tmp/there'))") == str(wanted)
    cp(f"{vm}:/tmp/there", str(tmp_path))
    made = tmp_path / "there"
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*")) == wanted
    assert (made / "many" / "ü 499").read_text() == "499"
    assert (made / "script").stat().st_mtime_ns == 1_600_000_000_000_000_000


def test_a_link_of_the_host_inside_the_target_is_not_followed(
    kernel: Kernel, vm: str, tmp_path: Path
) -> None:
    kernel.run(
        "os.makedirs('out/keys'); open('out/keys/id', 'w').write('new'); open('out/a', 'w').write('new')"
    )
    (tmp_path / "keys").mkdir()
    (tmp_path / "target" / "out").mkdir(parents=True)
    (tmp_path / "target" / "out" / "keys").symlink_to("../../keys")
    said = cp(f"{vm}:out", f"{tmp_path}/target", status=1)
    assert said == (
        "left out: out/keys: has the name of a link, or of another thing that is no file, where it should "
        "go\n"
        "1 file, 3 bytes\n"
    )
    assert not list((tmp_path / "keys").iterdir())
    assert (tmp_path / "target" / "out" / "a").read_text() == "new"
    (tmp_path / "link").symlink_to("keys")
    assert "leads over a link (link)" in cp(f"{vm}:out/a", f"{tmp_path}/link/a", status=1)
    assert not list((tmp_path / "keys").iterdir())


def test_a_link_of_the_guest_is_left_out_and_what_it_leads_to_stays_there(
    kernel: Kernel, vm: str, tmp_path: Path
) -> None:
    kernel.run(
        "os.makedirs('links'); os.symlink('/etc/passwd', 'links/file'); os.symlink('/etc', 'links/folder')\n"
        "os.symlink('/proc/1/environ', 'environ'); os.mkfifo('links/fifo'); open('links/own', 'w').write('x')"
    )
    said = cp(f"{vm}:links", str(tmp_path))
    assert sorted(said.splitlines()) == [
        "1 file, 1 byte",
        "left out: links/fifo: is neither a file nor a directory",
        "left out: links/file: is a link, which is not followed",
        "left out: links/folder: is a link, which is not followed",
    ]
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["own"]
    assert "symbolic links" in cp(f"{vm}:environ", str(tmp_path), status=1)
    (tmp_path / "file").write_text("new")
    kernel.run("open('old', 'w').write('old'); os.symlink('old', 'way')")
    assert "has the name of a link" in cp(f"{tmp_path}/file", f"{vm}:way", status=1)
    assert kernel.run("print(open('old').read())") == "old"


def test_what_cannot_be_read_is_named_and_the_rest_arrives(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    kernel.run(
        "os.makedirs('part/shut'); open('part/secret', 'w').close(); open('part/fine', 'w').write('x')\n"
        "os.chmod('part/secret', 0); os.chmod('part/shut', 0)"
    )
    said = cp(f"{vm}:part", str(tmp_path), status=1)
    assert sorted(said.splitlines()) == [
        "1 file, 1 byte",
        "left out: part/secret: Permission denied",
        "left out: part/shut: Permission denied",
    ]
    assert (tmp_path / "part" / "fine").read_text() == "x"
    assert "Permission denied" in cp(f"{vm}:/root", str(tmp_path), status=1)
    assert "Permission denied" in cp(f"{vm}:/etc/shadow", str(tmp_path), status=1)
    assert "Permission denied" in cp(f"{tmp_path}/part/fine", f"{vm}:/etc/new", status=1)
    for path in ("/proc/self/status", "/proc", "/dev/null"):
        assert "neither a file nor a directory" in cp(f"{vm}:{path}", str(tmp_path), status=1)


def test_a_kernel_that_is_busy_is_copied_from_and_to(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    (tmp_path / "go").write_bytes(os.urandom(1_000_000))
    cell = kernel.client.execute(
        "open('mine', 'w').write('mine')\nwhile not os.path.exists('go'): pass\nprint(digest('go'))"
    )
    assert until(lambda: "1 file" in subprocess_cp(f"{vm}:mine", str(tmp_path)), READY)
    assert (tmp_path / "mine").read_text() == "mine"
    cp(f"{tmp_path}/go", f"{vm}:")
    messages = kernel.iopub_until_idle(cell)
    text = [each["content"]["text"] for each in messages if each["msg_type"] == "stream"]
    # The file has its name when it is complete, and not before.
    assert "".join(text).strip() == digest(tmp_path / "go")
    kernel.reply_to(cell)


def subprocess_cp(*arguments: str) -> str:
    return subprocess.run([COMMAND, "cp", *arguments], capture_output=True, text=True, timeout=READY).stderr


def test_what_does_not_fit_into_the_guest_is_told_before_all_of_it_was_sent(
    kernel: Kernel, vm: str, tmp_path: Path
) -> None:
    with (tmp_path / "vast").open("wb") as file:
        file.truncate(5 << 30)
    said = cp(f"{tmp_path}/vast", f"{vm}:", status=1)
    assert "There is no room for vast in the guest (No space left on device)" in said
    assert kernel.run("print([n for n in os.listdir() if 'vast' in n or n.endswith('.copy')])") == "[]"


def test_more_than_the_bounds_allow_is_not_taken(kernel: Kernel, vm: str, tmp_path: Path) -> None:
    kernel.run("with open('sparse', 'wb') as file: file.truncate(6 << 30)")
    said = cp("--max-size", "2", f"{vm}:sparse", str(tmp_path), status=1)
    assert said == (
        "sandbox-kernel: sparse of the VM has more than 2 MiB, the most that is copied; raise --max-size, or "
        "copy a part of it.\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_copy_leaves_no_half_file_and_its_progress_is_seen(
    kernel: Kernel, vm: str, tmp_path: Path
) -> None:
    kernel.run("with open('sparse', 'wb') as file: file.truncate(6 << 30)")
    child = pexpect.spawn(COMMAND, ["cp", f"{vm}:sparse", str(tmp_path)], dimensions=(24, 120))
    child.expect(r"[1-9][0-9.]*(/6.4 GB| MB)", timeout=READY)
    child.sendintr()
    child.expect(pexpect.EOF, timeout=20)
    child.close()
    assert child.exitstatus == 1
    assert not list(tmp_path.iterdir())
    # The guest's end of it has gone, too.
    for _ in range(6):
        cp(f"{vm}:part/fine", str(tmp_path))


def test_a_vm_that_ends_under_a_copy_is_named(installed: None, tmp_path: Path) -> None:
    with microvm() as kernel:
        vm = kernel.manager.provisioner.report["id"]
        kernel.run("with open('sparse', 'wb') as file: file.truncate(6 << 30)")
        copying = subprocess.Popen(
            [COMMAND, "cp", f"{vm}:sparse", str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        time.sleep(2)
        kernel.qemu.kill()
        _, said = copying.communicate(timeout=READY)
    assert copying.returncode == 1
    assert f"as the VM {vm} has ended or stands still" in said
    assert not list(tmp_path.iterdir())
