"""Where templates are kept: one maker at a time, whole or not at all, checked on use."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from sandbox_kernel.errors import HostError
from sandbox_kernel.template.key import TemplateKey, identify_cpu, identify_qemu
from sandbox_kernel.template.store import RAM, STATE, Template, TemplateStore

KEY = TemplateKey("d" * 64, 512, 1, "tcg", (), False, ("/usr/bin/qemu", 1, 2), "", "quiet")


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates")


def saved(store: TemplateStore, key: TemplateKey = KEY) -> Template:
    with store.make(key) as staging:
        assert staging is not None
        (staging / RAM).write_bytes(b"ram" * 5000)
        (staging / STATE).write_bytes(b"state")
        return store.publish(staging, key, (7, 2, 22))


def test_what_was_published_is_opened_by_its_key_alone(store: TemplateStore) -> None:
    assert store.open(KEY) is None
    made = saved(store)
    found = store.open(KEY)
    assert found is not None
    assert (found.digest, found.ram.read_bytes()[:3]) == (made.digest, b"ram")
    assert found.bytes > 15000
    for other in (
        dataclasses.replace(KEY, image="e" * 64),
        dataclasses.replace(KEY, memory=513),
        dataclasses.replace(KEY, vcpus=2),
        dataclasses.replace(KEY, accelerator="kvm"),
        dataclasses.replace(KEY, modules=("numpy",)),
        dataclasses.replace(KEY, network=True),
        dataclasses.replace(KEY, qemu=("/usr/bin/qemu", 1, 3)),
        dataclasses.replace(KEY, cpu="other"),
        dataclasses.replace(KEY, machine="loud"),
        dataclasses.replace(KEY, format=KEY.format + 1),
    ):
        assert store.open(other) is None


def test_what_is_not_published_leaves_nothing(store: TemplateStore) -> None:
    with pytest.raises(RuntimeError), store.make(KEY) as staging:
        assert staging is not None
        (staging / RAM).write_bytes(b"half")
        raise RuntimeError
    assert [path.name for path in store.directory.iterdir()] == [f".lock-{KEY.digest()}"]


def test_a_second_maker_is_turned_away_and_others_are_not(store: TemplateStore) -> None:
    with store.make(KEY) as first, store.make(KEY) as second:
        assert first is not None
        assert second is None
        with store.make(dataclasses.replace(KEY, memory=1024)) as other:
            assert other is not None
            assert first.exists()


def test_what_a_killed_maker_left_is_swept_by_any_maker(store: TemplateStore) -> None:
    store.directory.mkdir()
    left = store.directory / f".build-{'a' * 24}"
    discarded = store.directory / f".build-{'b' * 24}.4711"
    for folder in (left, discarded):
        folder.mkdir()
        (folder / RAM).write_bytes(b"half")
    saved(store)
    assert not left.exists()
    assert not discarded.exists()


@pytest.mark.parametrize("harm", ["written to", "cut", "replaced", "gone", "no manifest", "strange manifest"])
def test_a_damaged_template_is_discarded_with_one_line(
    store: TemplateStore, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = saved(store)
    manifest = made.directory / "manifest.json"
    if harm == "written to":
        before = made.ram.stat()
        with made.ram.open("r+b") as ram:
            ram.write(b"evil")
        os.utime(made.ram, ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime tells all the same
    elif harm == "cut":
        os.truncate(made.state, 1)
    elif harm == "replaced":
        content = made.ram.read_bytes()
        made.ram.unlink()
        made.ram.write_bytes(content)
    elif harm == "gone":
        made.state.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"files": []}')
    with caplog.at_level(logging.WARNING):
        assert store.open(KEY) is None
    assert len(caplog.messages) == 1
    assert made.digest in caplog.messages[0]
    saved(store)
    assert store.open(KEY) is not None


def test_the_least_recently_used_go_first(store: TemplateStore) -> None:
    made = [saved(store, dataclasses.replace(KEY, memory=256 + number)) for number in range(3)]
    for age, template in enumerate(made):
        os.utime(template.directory / "manifest.json", (1e9 - age, 1e9 - age))
    store.open(dataclasses.replace(KEY, memory=258))
    assert store.collect(2 * made[0].bytes) == [made[1].digest]
    assert [template.key["memory"] for template in store.all()] == [258, 256]


def test_an_images_templates_go_with_it(store: TemplateStore) -> None:
    made = saved(store)
    other = saved(store, dataclasses.replace(KEY, image="e" * 64))
    assert store.forget(KEY.image) == [made.digest]
    assert [each.digest for each in store.all()] == [other.digest]


def test_a_template_is_removed_by_the_beginning_of_its_name(store: TemplateStore) -> None:
    made = saved(store)
    store.remove(made.digest[:12])
    assert store.all() == []
    with pytest.raises(HostError, match=r"There is no template '\w+'; `sandbox-kernel template ls` shows"):
        store.remove(made.digest)


def test_qemu_is_known_by_its_file_and_the_cpu_only_where_the_guest_sees_it(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(b"1")
    before = identify_qemu(program)
    program.write_bytes(b"22")
    assert identify_qemu(program) != before
    info = tmp_path / "cpuinfo"
    info.write_text("model name: A\nflags: x\ncpu MHz: 1\n\nmodel name: A\n")
    assert identify_cpu("tcg", info) == ""
    one = identify_cpu("kvm", info)
    info.write_text("model name: A\nflags: x\ncpu MHz: 2\n")
    assert identify_cpu("kvm", info) == one
    info.write_text("model name: A\nflags: x y\n")
    assert identify_cpu("kvm", info) != one
