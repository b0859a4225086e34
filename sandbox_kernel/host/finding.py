"""One line of `doctor`'s table: something that is required, what was found, what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked for.
        ok: whether it is there and good enough.
        needed: whether nothing works without it; otherwise something is slower or less bounded.
        found: a version or a state, in a few words.
        fix: what to do when it is not ok, as a command or a sentence; empty when there is nothing to do.
        packages: Debian packages that bring it.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    fix: str = ""
    packages: tuple[str, ...] = ()

    @property
    def fatal(self) -> bool:
        """Whether this alone keeps micro-VMs from running."""
        return self.needed and not self.ok
