"""Names of a package that are imported when first asked for: some bring the kernels or a compiler, which take
seconds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: dict[str, Any], where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `globals()`.
        where: {name: the module that has it, relative to the package (".runtime.fuse")}.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        module = importlib.import_module(where[name], package["__name__"])
        value = package[name] = getattr(module, name)
        return value

    return get, lambda: sorted({*package, *where})
