"""Why a kernel is dead: one record, told alike to the running cell, to the client and to the log. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.errors import GuestError, LimitExceeded, SandboxKernelError

_LONGEST = 4000


@dataclass(frozen=True)
class Death:
    """How a kernel died.

    Attributes:
        name: the class in errors.py; a cell's `ename`.
        message: a sentence for the user; a cell's `evalue`.
        limit: the limit that was reached, in `unit`; None when it was none.
        peak: the most that was seen of what is limited, in `unit`; None where there is no figure.
        unit: MiB, s, …
        uptime: seconds that the kernel had run.
        by_user_code: the code in the kernel ended it on purpose.
    """

    name: str
    message: str
    limit: float | None = None
    peak: float | None = None
    unit: str = ""
    uptime: float = 0.0
    by_user_code: bool = False

    @classmethod
    def of(cls, error: SandboxKernelError, uptime: float = 0.0, by_user_code: bool = False) -> Death:
        """The death that `error` is the cause of."""
        limit = error if isinstance(error, LimitExceeded) else None
        return cls(
            type(error).__name__,
            str(error),
            limit.limit if limit else None,
            limit.peak if limit else None,
            limit.unit if limit else "",
            round(uptime, 3),
            by_user_code,
        )

    def to_dict(self) -> dict[str, Any]:
        """This record as JSON's types, without what there is no figure for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Death:
        """The inverse of `to_dict`.

        Raises:
            GuestError: it is no such record.
        """
        try:
            limit, peak = (
                None if values.get(name) is None else float(values[name]) for name in ("limit", "peak")
            )
            return cls(
                str(values["name"])[:_LONGEST],
                str(values["message"])[:_LONGEST],
                limit,
                peak,
                str(values.get("unit", ""))[:_LONGEST],
                float(values.get("uptime", 0)),
                values.get("by_user_code") is True,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GuestError(f"The record of a kernel's death is malformed ({error!r}).") from error

    def figures(self, cell_seconds: float) -> str:
        """Limit, peak and durations on one line, for people."""
        parts = [
            f"{word} {value:g} {self.unit}"
            for word, value in (("limit", self.limit), ("peak", self.peak))
            if value is not None
        ]
        return ", ".join([*parts, f"cell {cell_seconds:.1f} s", f"kernel {self.uptime:.1f} s"])
