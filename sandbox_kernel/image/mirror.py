"""Which mirror of the Debian archive to fetch from.

A host that is itself a Debian knows a mirror it can reach, maybe the only one (a company's network, a CI
runner). So: what the user names, else the first Debian main archive among the host's own apt sources, else
None, which leaves the choice to mmdebstrap. Both notations are read: the one-line style and deb822
(sources.list(5)). A mirror is how the bytes travel, not what they are: signatures guard them, and the mirror
is no input of an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

APT = Path("/etc/apt")


def host_mirror(apt: Path = APT) -> str | None:
    """The first Debian main archive that the host fetches packages from; None when it has none."""
    lists = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for file in lists:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        found = (
            _deb822(text) if file.suffix == ".sources" else _one_line(text) if file.suffix == ".list" else ()
        )
        for uri in found:
            if _is_debian_archive(uri):
                return uri
    return None


def _one_line(text: str) -> Iterable[str]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+\S+\s+(.*)", line)
        if match and "main" in match[2].split("#")[0].split():
            yield match[1]


def _deb822(text: str) -> Iterable[str]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = fields.get(name, "") + " " + line.strip()
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off")
        if (
            enabled
            and "deb" in fields.get("types", "").split()
            and "main" in fields.get("components", "").split()
        ):
            yield from fields.get("uris", "").split()


def _is_debian_archive(uri: str) -> bool:
    """Whether the address looks like a mirror of Debian's main archive (not security, not Ubuntu's)."""
    return bool(re.fullmatch(r"(https?|ftp|file|copy)://?\S*/debian/?", uri))
