"""The guest image of a suite: the default one, or one with the packages that the suite's cells import."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox_kernel.host import template
from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import ImageStore
from sandbox_kernel.spec import VMSpec

DEFAULT = "default"
NAME = "conformance"


def image(packages: Sequence[str]) -> str:
    """Name of an image with `packages`, and with a template; both are made when they are not there."""
    name = NAME if packages else DEFAULT
    if packages:
        recipe = default_recipe().with_packages(tuple(packages))
        build(Order(recipe=recipe, name=NAME), ImageStore(), Silent())
    template.ensure(VMSpec(image=name), Silent())
    return name
