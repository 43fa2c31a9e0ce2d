"""Names by one rule (`adn_kernels/README.md`), no kernel without a launch, no op without a caller in `adn`."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import triton
from torch._library.custom_ops import OPDEFS

import adn_kernels
from adn_kernels import ops

ROOT = Path(__file__).parents[2]
MODULES = {name: importlib.import_module(f"adn_kernels.{name}")
           for _, name, _ in pkgutil.iter_modules(adn_kernels.__path__)}
each_file = pytest.mark.parametrize("name", MODULES)


def own(module: ModuleType, kind: type) -> dict[str, object]:
    """What a module defines of a kind."""
    return {name: value for name, value in vars(module).items()
            if isinstance(value, kind) and getattr(value, "__module__", module.__name__) == module.__name__}


def begins(name: str, prefix: str, stem: str) -> bool:
    """`prefix`, the stem of the file, and nothing or what of it."""
    rest = name.removeprefix(prefix + stem)
    return name.startswith(prefix + stem) and (not rest or rest.startswith("_"))


def names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def launched(module: ModuleType) -> Iterator[str]:
    """Names that stand where `launch` expects a kernel; of a variable, what is assigned to it."""
    tree = ast.parse(Path(module.__file__).read_text())
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "launch":
            name = call.args[0].id
            if name != "kernel":
                yield name
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and "kernel" in names(node.targets[0]):
                    yield from (n for n in names(node.value) if n.endswith("_kernel"))


@each_file
def test_kernels(name: str) -> None:
    """`<file>[_<what>]_kernel`: all that is launched, and nothing else."""
    module = MODULES[name]
    kernels = {n for n in own(module, triton.runtime.JITFunction) if n.endswith("_kernel")}
    assert kernels == set(launched(module))
    assert not [n for n in kernels if not begins(n.removesuffix("_kernel"), "", name)]


@each_file
def test_launchers_and_references(name: str) -> None:
    """`launch_<file>[_<what>]`, `<file>[_<what>]_reference`."""
    module = MODULES[name]
    functions = {n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__}
    assert not [n for n in functions if n.startswith("launch_") and not begins(n, "launch_", name)]
    if name not in ("activation", "epilogue"):  # of which ops are made
        assert not [n for n in functions if n.endswith("_reference")
                    and not begins(n.removesuffix("_reference"), "", name)]


def test_ops() -> None:
    """`adn::<file>[_<what>]` is `<file>[_<what>]_op` in its file; `adn::<file>_` is `<file>_inplace_op`."""
    seen = set()
    for name, module in MODULES.items():
        for attribute, value in vars(module).items():
            qualname = getattr(value, "_qualname", None)
            if isinstance(qualname, str) and qualname.startswith("adn::") and attribute.endswith("_op"):
                op = qualname.removeprefix("adn::")
                assert begins(op, "", name)
                assert attribute == (f"{op}inplace_op" if op.endswith("_") else f"{op}_op")
                seen.add(qualname)
    assert seen == {qualname for qualname in OPDEFS if qualname.startswith("adn::")}


def reached() -> set[str]:
    """Names of `ops` that stand in the code of `adn`."""
    found = set()
    for path in (ROOT / "adn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
                found.add(node.attr)
    return found


def test_every_op_has_a_caller_in_adn() -> None:
    assert set(ops.__all__) - reached() <= {"ACTIVATIONS"}
    public = {name for name in ops.__all__ if callable(getattr(ops, name))}
    # A registered op is a public one, or a part of it: its backward, a piece, another's implementation.
    for qualname in OPDEFS:
        if qualname.startswith("adn::"):
            op = qualname.removeprefix("adn::")
            assert op in public or any(begins(op, "", name) for name in public if not name.endswith("_")), op
