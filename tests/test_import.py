"""Importing is light and touches no device; the public names are pinned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import adn
import adn_kernels

PUBLIC = {
    "CheckpointError", "ConversionError", "Depth", "Engine", "FusedNet", "Plan", "Profile", "SelfDistillation",
    "StagePlan", "accelerate", "at_depth", "calibrate", "compile", "convert", "convert_sync_batchnorm", "create_model",
    "depths", "evaluate", "export_onnx", "extract", "fit_budget", "freeze_batch_norm", "fuse", "fusions",
    "fx_leaf_modules",
    "get_depth", "list_models", "load", "load_weights", "plan", "profile", "save", "set_depth", "stages", "update_bn",
    "use_kernels",
}

PROBE = """
import sys, time
import torch, timm
loaded = set(sys.modules)
before = time.perf_counter()
import adn
took = time.perf_counter() - before
assert not torch.cuda.is_initialized()
optional = {"matplotlib", "onnx", "onnxruntime", "sklearn", "tensorboard", "triton"} & set(sys.modules) - loaded
assert not optional, optional
print(took)
"""


def test_public_names() -> None:
    assert set(adn.__all__) == PUBLIC
    assert all(hasattr(adn, name) for name in PUBLIC)
    assert set(dir(adn)) >= PUBLIC
    assert not hasattr(adn, "no_such_thing")


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The bound is the promise made to users, an order of magnitude above what it takes.
    assert float(done.stdout) < 3


# Each room may import those before it in the list; `detection` only has names for scripts.
ROOMS = ("core", "families", "convert", "distill", "routers", "data", "settings", "detect", "models", "weights",
         "measure", "tasks", "export", "runtime", "routing", "train", "demo", "cli", "__main__", "detection")



def modules() -> dict[str, Path]:
    found = {}
    for package in (adn, adn_kernels):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Also those inside of functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module


def test_imports_point_one_way() -> None:
    known = modules()
    graph = {name: {other for other in imports(name, path, known)
                    if other in known and other not in ("adn", name, name.rpartition(".")[0])}
             for name, path in known.items() if name != "adn"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
    for name, others in graph.items():
        for other in others:
            assert not (name.startswith("adn_kernels") and other.startswith("adn.")), f"{name} imports {other}"
            if name.startswith("adn.") and other.startswith("adn."):
                room, below = (ROOMS.index(module.split(".")[1]) for module in (name, other))
                assert below <= room, f"{name} imports {other}, a room above its own"


def test_rooms_say_what_belongs_in_them() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"


def test_names_for_scripts() -> None:
    """By which detection was once imported."""
    script = ("import importlib, adn.detection\n"
              "for name in 'boxes criterion decoder deformable denoising encoder matcher rtdetr'.split():\n"
              "    module = importlib.import_module(f'adn.detection.{name}')\n"
              "    assert module is getattr(adn.detection, name)\n"
              "from adn.detection.rtdetr import RTDETR\n"
              "assert RTDETR is adn.detection.RTDETR\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What only the folder of that model knows: its names, what is in its outputs, what its parts are called.
OF_ONE_MODEL = re.compile(r"rtdetr|RTDETR|pred_logits|pred_boxes|query_index|_score_head")
PARTS = re.compile(r"\bbackbone\.")


def test_a_model_is_known_in_its_own_folder_only() -> None:
    """But by `adn.detection`, which has names for scripts, and where a command explains itself."""
    for name, path in modules().items():
        its_own = name.startswith(("adn.models.rtdetr", "adn.models.torchvision_detectors", "adn.models.yolov7",
                                   "adn.families.transformers_detr"))
        if not name.startswith("adn.") or its_own or name == "adn.detection":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words = [ast.unparse(node)]
            else:
                words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            for word in words:
                prose = " " in word and isinstance(node, ast.Constant)
                known = not prose and PARTS.search(word)
                if not (prose and name.startswith("adn.cli.")):
                    known = known or OF_ONE_MODEL.search(word)
                assert not known, f"{name} knows {word!r}"
