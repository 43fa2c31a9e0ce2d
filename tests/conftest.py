"""Shared by all tests: golden fixtures, randomised models, small inputs."""

from __future__ import annotations

import copy
import csv
import datetime
import importlib.util
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torch.multiprocessing
import torchvision
import triton
from torch import nn

from adn.core import behaviours

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # some of what benchmarks measure is what tests count

GOLDEN = Path(os.environ.get("ADN_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # also for the processes that tests start
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    # Shells ignore it for what runs in the background, and so would everything that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (results := config.getoption("--results")) is not None:
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--results: leave out -n; each process would write over the tables of the others")
        results.mkdir(parents=True, exist_ok=True)  # now, not when there is something to lose
    if os.environ.get("ADN_PTX") == "1":
        sys.path.append(str(ROOT / "tests" / "kernels"))
        config.pluginmanager.import_plugin("ptx.plugin")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Types by name, for `-k bfloat16`."""
    return str(val) if isinstance(val, torch.dtype) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Tests of launchers run on a GPU, or in an interpreter and then alone (see tests/kernels/harness.py)."""
    triton_interprets = os.environ.get("TRITON_INTERPRET") == "1"
    interpreted = triton_interprets or os.environ.get("ADN_PTX") == "1"
    on_gpu = torch.cuda.is_available() and not interpreted
    chosen = []
    for item in items:
        of_launcher = item.get_closest_marker("launcher") is not None
        if of_launcher and on_gpu:
            item.add_marker("cuda")
        runs = of_launcher if interpreted else (on_gpu or not of_launcher)
        if runs and (triton_interprets or item.get_closest_marker("interpreter") is None):
            chosen.append(item)
    passed = config.getoption("--but")
    but = set(passed.read_text().splitlines()) if passed else set()
    items[:] = [item for item in chosen if item.nodeid not in but]
    yield
    items[:] = sample(items, config.getoption("--sample"))  # of what `-k` and `-m` have left


def sample(items: list[pytest.Item], n: int | None) -> list[pytest.Item]:
    """Of each test n cases, the same each time: drawn, as every k-th of a product would leave out values of the last
    parameter."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    chosen = {item for name, some in cases.items()
              for item in (some if n is None or len(some) <= n else random.Random(name).sample(some, n))}
    return [item for item in items if item in chosen]


BROKEN = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport]:
    if call.excinfo is not None and isinstance(call.excinfo.value, torch.AcceleratorError):
        item.config.stash[BROKEN] = True
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """After a CUDA error all that follows in the process may fail: of several, another takes over the other tests."""
    if item.config.stash.get(BROKEN, False) and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="of each test, run at most N of its cases")
    parser.addoption("--but", type=Path, metavar="FILE", help="run none of the tests named in this file, one a line")
    parser.addoption("--results", type=Path, metavar="DIR", help="write tables of what the tests found to this folder")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, object]]]:
    """Rows to write to `<test module>.csv` in the folder of `--results`."""
    rows: list[dict[str, object]] = []
    yield rows
    folder = request.config.getoption("--results")
    if folder is not None and rows:
        with (folder / f"{request.module.__name__}.csv").open("w", newline="") as file:
            commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True,
                                    text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
            versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (
                torch, torchvision, timm, triton))
            file.write(f"# {versions}, commit {commit}, {datetime.date.today()}\n")
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def few(cases: Iterable[object], in_ci: Callable[[object], bool]) -> list[object]:
    """Cases to parametrize with: those for which `in_ci` holds always, the others with `-m full`.

    A case of several parameters is a tuple.
    """
    return [case if in_ci(case) else pytest.param(*(case if isinstance(case, tuple) else (case,)),
                                                  marks=pytest.mark.full) for case in cases]


def in_two_processes(worker: Callable[..., None], *args: object) -> None:
    """Runs `worker(rank, *args)` for both ranks; an error of one is raised here. They are forked from a process that
    has imported what takes long to import and nothing else, which is started once."""
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "timm", "adn", "pytest"])
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method="forkserver")


@pytest.fixture
def ieee() -> Iterator[None]:
    """float32 products in float32: whether convolutions take TF32 would else be cuDNN's choice, case by case."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def exact_products_of_kernels(request: pytest.FixtureRequest) -> None:
    """What error a kernel is allowed depends on that of eager PyTorch."""
    if request.path.parent.name == "kernels":
        request.getfixturevalue("ieee")


@pytest.fixture(scope="session")
def seeded() -> ModuleType:
    """The module that regenerates the weights and inputs of the golden fixtures from their names."""
    path = GOLDEN / "seeded.py"
    if not path.exists():
        pytest.skip(f"no golden fixtures at {GOLDEN} (set ADN_GOLDEN)")
    spec = importlib.util.spec_from_file_location("golden_seeded", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while the class is being made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden(seeded: ModuleType) -> Callable[[str], tuple[dict, dict]]:
    """name -> (manifest, arrays)."""

    def load(name: str) -> tuple[dict, dict]:
        fixture = seeded.load_fixture(name)
        return fixture.manifest, fixture.arrays

    return load


@pytest.fixture(scope="session")
def dynamic(seeded: ModuleType) -> ModuleType:
    """What the fixtures of dynamic detection do to weights and inputs."""
    spec = importlib.util.spec_from_file_location("golden_dynamic", GOLDEN / "dynamic_detection.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["seeded"] = seeded
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["seeded"]
    return module


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine parameters, statistics and layer scales, in place.

    Libraries initialise the last norm or the layer scale of a residual block to (nearly) zero: without this, base and
    super compute the same and half of the tests could not fail.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in tensors:
                if behaviours.is_norm(module) and tensor.is_floating_point():
                    positive = name in ("weight", "running_var")
                    tensor.uniform_(0.5, 1.5, generator=generator) if positive else tensor.normal_(
                        0, 0.1, generator=generator)
                elif name.startswith(("gamma", "layer_scale")) or name == "gain":
                    tensor.uniform_(0.3, 0.7, generator=generator)
                elif tensor.ndim == 2 and isinstance(module, nn.Linear) and not tensor.any():
                    tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)  # heads initialised to zero
    return model


_built: OrderedDict[str, nn.Module] = OrderedDict()  # copying takes a tenth of what initialising does


def build(name: str, **kwargs: object) -> nn.Module:
    """A fresh model of timm, or of torchvision for a name that begins with `tv_`; randomised, in eval mode."""
    key = f"{name} {sorted(kwargs.items())}"
    if key not in _built:
        torch.manual_seed(0)
        if name.startswith("tv_"):
            model = torchvision.models.get_model(name.removeprefix("tv_"), **kwargs)
        else:
            model = timm.create_model(name, **kwargs)
        _built[key] = randomise(model).eval()
    _built.move_to_end(key)
    if len(_built) > 8:
        _built.popitem(last=False)
    torch.manual_seed(0)  # what a test draws afterwards does not depend on those before it
    return copy.deepcopy(_built[key])
