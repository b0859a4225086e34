"""Where the guest's programs and the kernelspecs lie: in the wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def guest_dir() -> Path:
    """Folder of the guest's programs (init and agent), copied into each image."""
    return _find("_guest", "guest")


def kernelspecs_dir() -> Path:
    """Folder with one kernelspec folder per kernel."""
    return _find("_kernelspecs", "kernelspecs")


def _find(in_wheel: str, in_checkout: str) -> Path:
    inside = _PACKAGE / in_wheel
    return inside if inside.is_dir() else _PACKAGE.parent / in_checkout
