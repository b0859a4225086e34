"""The store: names, damage, locks, what interrupted builds leave."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_kernel.errors import ConfigurationError, ImageError
from sandbox_kernel.image import manifest as manifests
from sandbox_kernel.image import verification
from sandbox_kernel.image.manifest import Content, Manifest
from sandbox_kernel.image.store import Image, ImageStore


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def put(store: ImageStore, content: str = "one", name: str | None = "default") -> str:
    """An image whose root is `content`; returns its digest."""
    with store.locked(), store.workshop() as workshop:
        folder = workshop / "image"
        folder.mkdir()
        for file in manifests.FILES:
            (folder / file).write_text(f"{file} {content}")
        digest = store.adopt(folder, manifest_of(folder, content))
        if name is not None:
            store.call(digest, name)
        return digest


def manifest_of(folder: Path, inputs: str) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        builder="0",
        created="2025-01-01T00:00:00+00:00",
        input_digest=hashlib.sha256(inputs.encode()).hexdigest(),
        base_digest=hashlib.sha256(b"base").hexdigest(),
        inputs={"suite": inputs},
        python="3.13",
        kernel="6.12",
        kernel_build="#1",
        debian={},
        packages={},
        files={name: manifests.hash_file(folder / name) for name in manifests.FILES},
    )


def folders(store: ImageStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir() if len(path.name) == 64)


def test_an_image_is_found_by_name_by_digest_and_by_a_part_of_it(store: ImageStore) -> None:
    digest = put(store)
    for name in ("default", digest, digest[:12]):
        image = store.open(name)
        assert (image.name, image.digest) == (name, digest)
        assert image.root.read_text() == "root.erofs one"
        assert {image.vmlinux.parent, image.initrd.parent, image.root.parent} == {image.directory}


def test_a_missing_image_says_how_to_build_it(store: ImageStore) -> None:
    with pytest.raises(ImageError, match=r"no image 'default' .* run `sandbox-kernel image build`\.$"):
        store.open()
    with pytest.raises(ImageError, match=r"run `sandbox-kernel image build --name science`\.$"):
        store.open("science")
    with pytest.raises(ImageError, match="no image"):
        store.open("0" * 64)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "-rf", "a\0b", "a\nb", "x" * 129, "a..b"]
)
def test_hostile_names_are_refused_everywhere(store: ImageStore, name: str) -> None:
    digest = put(store)
    for attempt in (store.open, store.remove, lambda name: store.call(digest, name)):
        with pytest.raises(ConfigurationError, match="no name for an image"):
            attempt(name)


def test_a_name_that_leads_out_of_the_store_is_no_image(store: ImageStore, tmp_path: Path) -> None:
    digest = put(store)
    outside = tmp_path / "elsewhere" / digest
    outside.parent.mkdir()
    (store.directory / digest).rename(outside)
    (store.directory / "names" / "evil").symlink_to(outside)
    with pytest.raises(ImageError, match="no image 'evil'"):
        store.open("evil")
    with pytest.raises(ImageError, match="no image 'evil'"):
        store.remove("evil")
    assert outside.exists()


@pytest.mark.parametrize("file", manifests.FILES)
def test_a_damaged_file_is_named_with_the_fix(store: ImageStore, file: str) -> None:
    image = store.directory / put(store)
    store.open()
    content = (image / file).read_text()
    (image / file).write_text(content.replace("one", "oNe"))
    with pytest.raises(
        ImageError, match=rf"{file} is damaged: .* build it again with `sandbox-kernel image build`"
    ):
        store.open()


def test_damage_that_keeps_size_and_time_is_seen(store: ImageStore) -> None:
    root = store.directory / put(store) / "root.erofs"
    store.open()
    before = root.stat()
    root.write_text(root.read_text().replace("one", "oNe"))
    os.utime(root, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ImageError, match="damaged"):
        store.open()


def test_a_missing_file_is_named(store: ImageStore) -> None:
    (store.directory / put(store) / "vmlinux").unlink()
    with pytest.raises(ImageError, match=r"vmlinux is missing"):
        store.open()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": 99}', '{"format": 1, "files": {}}', "{" * 9999]
)
def test_a_manifest_that_is_none_is_an_error_of_ours(store: ImageStore, text: str) -> None:
    (store.directory / put(store) / manifests.FILE).write_text(text)
    with pytest.raises(ImageError, match=r"manifest\.json cannot be read"):
        store.open()


def test_another_images_manifest_is_refused(store: ImageStore) -> None:
    one, two = put(store), put(store, "two", "two")
    manifest = (store.directory / two / manifests.FILE).read_text()
    (store.directory / one / manifests.FILE).write_text(manifest)
    with pytest.raises(ImageError, match="belongs to another image"):
        store.open()


def test_files_are_read_once_while_nobody_touches_them(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    store.open()
    read: list[Path] = []
    monkeypatch.setattr("sandbox_kernel.image.verification.hash_file", read.append)
    store.open()
    assert read == []


def test_an_unwritable_cache_is_no_error(store: ImageStore, tmp_path: Path) -> None:
    put(store)
    (tmp_path / "cache").write_text("not a folder")
    assert store.open().name == "default"


def test_a_name_moves_to_the_new_image_and_the_old_one_stays(store: ImageStore) -> None:
    old, new = put(store), put(store, "two")
    assert store.open().digest == new
    assert folders(store) == sorted([old, new])
    assert [(image.name, image.digest) for image in store.list()] == [("default", new), ("", old)]


def test_equal_content_is_kept_once(store: ImageStore) -> None:
    assert put(store) == put(store, name="twin")
    assert len(folders(store)) == 1
    assert [image.name for image in store.list()] == ["default", "twin"]


def test_the_last_name_takes_the_image_with_it(store: ImageStore) -> None:
    digest = put(store)
    put(store, name="twin")
    store.remove("twin")
    assert store.open().digest == digest
    store.remove("default")
    assert folders(store) == []
    assert list((store.directory / "inputs").iterdir()) == []


def test_a_digest_removes_all_names(store: ImageStore) -> None:
    digest = put(store)
    put(store, name="twin")
    assert store.remove(digest[:16]) == digest
    assert store.list() == []


def test_an_unchanged_recipe_finds_its_image_unless_that_is_damaged(store: ImageStore) -> None:
    digest = put(store)
    inputs = hashlib.sha256(b"one").hexdigest()
    found = store.built_from(inputs)
    assert found is not None
    assert found.digest == digest
    assert store.built_from("0" * 64) is None
    (store.directory / digest / "initrd").write_text("x")
    assert store.built_from(inputs) is None


def test_building_again_mends_a_damaged_image(store: ImageStore) -> None:
    digest = put(store)
    (store.directory / digest / "initrd").write_text("x")
    assert put(store) == digest
    assert store.open().initrd.read_text() == "initrd one"


def test_an_image_that_differs_in_programs_only_serves_as_a_base(store: ImageStore) -> None:
    digest = put(store)
    base = store.with_base(hashlib.sha256(b"base").hexdigest())
    assert base is not None
    assert base.digest == digest
    assert store.with_base("0" * 64) is None


def test_what_an_interrupted_build_has_left_is_removed_by_the_next(store: ImageStore) -> None:
    leftover = store.directory / ".build-dead/root/locked"
    leftover.mkdir(parents=True)
    (leftover / "file").write_text("x")
    leftover.chmod(0o500)
    put(store)
    assert [path.name for path in store.directory.glob(".build-*")] == []


def test_a_failed_build_leaves_nothing(store: ImageStore) -> None:
    with pytest.raises(RuntimeError), store.locked(), store.workshop() as workshop:
        (workshop / "image").mkdir()
        raise RuntimeError
    assert [path.name for path in store.directory.iterdir()] == [".lock"]


def test_a_second_builder_is_told_and_waits(store: ImageStore) -> None:
    waiting = threading.Event()
    order: list[str] = []

    def second() -> None:
        with ImageStore(store.directory).locked(waiting.set):
            order.append("second")

    with store.locked():
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_a_killed_builder_holds_no_lock(store: ImageStore) -> None:
    program = (
        "import sys; from pathlib import Path; from sandbox_kernel.image.store import ImageStore\n"
        "with ImageStore(Path(sys.argv[1])).locked():\n print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(store.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"locked\n"
        builder.kill()
        builder.wait()
        told: list[bool] = []
        with store.locked(lambda: told.append(True)):
            assert told == []


def test_a_manifest_reads_back_as_it_was_written(store: ImageStore) -> None:
    put(store)
    image: Image = store.open()
    assert manifests.parse(image.manifest.to_json()) == image.manifest
    assert image.manifest.digest() == image.digest
    other = dataclasses.replace(
        image.manifest, files={**image.manifest.files, "initrd": manifests.Content("0" * 64, 1)}
    )
    assert other.digest() != image.digest


def test_two_folders_with_the_same_image_are_each_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    hash_file = verification.hash_file

    def counted(file: Path) -> Any:
        read.append(file)
        return hash_file(file)

    monkeypatch.setattr(verification, "hash_file", counted)
    content = Content(hashlib.sha256(b"x").hexdigest(), 1)
    manifest = SimpleNamespace(files={"vmlinux": content}, digest=lambda: "d")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "vmlinux").write_bytes(b"x")
    for folder in folders * 3:
        verification.verify(folder, manifest)  # type: ignore[arg-type]
    assert len(read) == 2
