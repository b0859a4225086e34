"""The paper that goes with an image: what it was made from, what is in it, and the hash of each file.

It is JSON in `manifest.json` beside the files. The image's name by content, its digest, is the sha256 over
the lines "NAME SHA256\\n" of its files in the order of their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import ImageError

FORMAT = 1
FILE = "manifest.json"
FILES = ("initrd", "root.erofs", "vmlinux")
_MAX_SIZE = 16 << 20


@dataclass(frozen=True)
class Content:
    """One file of an image: sha256 in hexadecimal and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What is known about an image.

    Attributes:
        format: version of this paper.
        builder: version of sandbox-kernel that built it.
        created: time of the build, ISO 8601, UTC.
        input_digest: the recipe's digest.
        base_digest: the recipe's digest without our own programs.
        inputs: the recipe.
        python: the guest's Python, such as `3.13`.
        kernel: release of the guest's kernel.
        kernel_build: its build, with the Debian version.
        debian: Debian packages and their versions.
        packages: Python packages and their versions.
        files: the image's files.
    """

    format: int
    builder: str
    created: str
    input_digest: str
    base_digest: str
    inputs: dict[str, Any]
    python: str
    kernel: str
    kernel_build: str
    debian: dict[str, str]
    packages: dict[str, str]
    files: dict[str, Content]

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that the image wants imported in its templates."""
        return tuple(map(str, self.inputs.get("preload", ())))

    def digest(self) -> str:
        """The image's name by content, in hexadecimal."""
        return digest(self.files)

    def size(self) -> int:
        """Bytes of all files together."""
        return sum(content.size for content in self.files.values())

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def digest(files: Mapping[str, Content]) -> str:
    """The name by content of an image with these files, in hexadecimal."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(file: Path) -> Content:
    """Reads a file to its end and says what is in it."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256")
    return Content(found.hexdigest(), file.stat().st_size)


def read(directory: Path) -> Manifest:
    """The manifest of the image in `directory`.

    Raises:
        ImageError: it is missing or is none.
    """
    file = directory / FILE
    try:
        if file.stat().st_size > _MAX_SIZE:
            raise ValueError("too long")
        manifest = parse(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ImageError(f"{file} cannot be read ({error}); run `sandbox-kernel image build`.") from error
    return manifest


def parse(text: str) -> Manifest:
    """The manifest that `to_json` wrote.

    Raises:
        ValueError: the text is none, or of another format.
    """
    raw = json.loads(text)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"no manifest of format {FORMAT}")
    try:
        files = {
            str(name): Content(str(content["sha256"]), int(content["size"]))
            for name, content in raw.pop("files").items()
        }
        manifest = Manifest(**raw, files=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a field is missing or wrong: {error}") from error
    hashes = [manifest.input_digest, manifest.base_digest, *(content.sha256 for content in files.values())]
    if tuple(sorted(files)) != FILES or not all(_is_sha256(value) for value in hashes):
        raise ValueError("a file or a hash is missing")
    return manifest


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and bool(re.fullmatch(r"[0-9a-f]{64}", text))
