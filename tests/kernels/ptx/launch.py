"""Puts the execution of PTX in the place of a GPU: `install` makes every Triton kernel run so, on CPU tensors."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver, jit

from .machine import Machine, prepare
from .memory import Global
from .program import Program

TARGET = GPUTarget("cuda", 90, 32)
SEED = int(os.environ.get("ADN_PTX_SEED", "0"))


@dataclass
class Count:
    """Of a kernel.

    Attributes:
        variants: hashes of what was compiled, each for other types, constants, alignments or options.
        instructions: executed, each counted once for each thread.
        contested: threads whose store was lost to another, as `memory.Shared` says.
    """

    variants: set[str] = field(default_factory=set)
    launches: int = 0
    instructions: int = 0
    contested: int = 0


counts: defaultdict[str, Count] = defaultdict(Count)  # by module and name
random_state = Counter()  # launches of the seed so far; `reseed` starts it anew
_programs: dict[str, Program] = {}


def reseed() -> None:
    """What is drawn from here on (the order of CTAs and of atomics) is the same as after the last call."""
    random_state.clear()


class Driver:
    """What Triton asks of the driver of a GPU before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """For the whole process, before the first launch."""
    # Nothing is assembled; so that nobody else finds kernels without code, they have a cache of their own.
    os.environ["TRITON_CACHE_DIR"] = os.environ.get("ADN_PTX_CACHE", str(Path.home() / ".triton" / "ptx"))
    CUDABackend.make_cubin = lambda *_: b""
    driver.set_active(Driver())
    compile_only = jit.JITFunction.run

    def run(self: jit.JITFunction, *args: Any, grid: Sequence[int], warmup: bool = False, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        if not warmup:
            names = [parameter.name for parameter in self.params]
            launch(f"{self.__module__}.{self.__name__}", kernel, grid, dict(zip(names, args)) | kwargs)
        return kernel

    jit.JITFunction.run = run


def launch(name: str, kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    """Executes a compiled kernel and counts that."""
    if kernel.hash not in _programs:
        _programs[kernel.hash] = prepare(kernel.asm["ptx"])
    count = counts[name]
    count.variants.add(kernel.hash)
    count.launches += 1
    random_state["launches"] += 1
    machine = Machine(_programs[kernel.hash], kernel.metadata.shared, [SEED, random_state["launches"]])
    try:
        execute(machine, kernel, grid, arguments)
    except Exception as error:
        error.add_note(f"in {name}, grid {tuple(grid)}")
        raise
    finally:
        count.instructions += machine.executed
        count.contested += machine.contested


def execute(machine: Machine, kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    """A compiled kernel's program, which the machine has.

    Args:
        arguments: by name; tensors on the CPU, numbers.
    """
    memory, given = Global(int(np.prod(grid))), []
    for parameter, type in kernel.src.signature.items():
        if type == "constexpr":
            continue
        value = arguments[parameter]
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            memory.add(storage.data_ptr(), storage.nbytes(), value.element_size())
            value = value.data_ptr()
        given.append(value)
    # Then come memory for scratch and for profiles, for which no kernel here asks.
    given += [0] * (len(machine.program.parameters) - len(given))
    machine.run(tuple(grid), given, memory)
