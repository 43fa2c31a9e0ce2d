"""Compiling the launches of a launcher ahead of time, for GPUs that need not be there, and reading the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import adn_kernels.launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1",
}
# Of an H200: bytes per second of a copy, operations per second of a bf16 product. What a kernel should take at best.
BANDWIDTH, RATE = 4.3e12, 790e12
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Launch:
    """One launch as a launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__


class FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> FakeMode:
        return self  # with a copy of a net; tensors of two modes do not go together


@contextmanager
def fake_cuda(architecture: str = "none", mode: FakeMode | None = None) -> Iterator[None]:
    """Inside, tensors may be made on "cuda" without one: they have shapes and strides and no memory.

    Args:
        architecture: that launchers choose configurations for.
        mode: to be used, one that notes what is called for instance.
    """
    with mode or FakeMode(), mock.patch.object(adn_kernels.launch, "_architecture", return_value=architecture):
        yield


def record(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches of `launcher(*args)`, with tensors made inside `fake_cuda`; none of them runs."""
    launches = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*values: Any, **options: Any) -> None:
                named = dict(zip(self.kernel.arg_names, values))
                special = {k: options.pop(k) for k in ("num_warps", "num_stages") if k in options}
                assert set(options) <= set(self.kernel.arg_names), f"unknown options {options}"
                launches.append(Launch(self.kernel, grid, {**named, **options}, special))

            return run

    with mock.patch.object(adn_kernels.launch, "wrap_triton", Recorder):
        launcher(*args, **kwargs)
    return launches


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """What is compiled of a launch.

    Returns:
        kernel, target, registers, spills (bytes of stack and spilled registers), shared (bytes), `loads`, `stores`:
        {width in bytes: count} of global memory accesses, `mma`: count of tensor-core instructions.
    """
    binary = binary_of(launch, target)
    found = _read_amd(binary) if TARGETS[target].backend == "hip" else _read_nvidia(binary)
    return {"kernel": launch.name, "target": target, "shared": binary.metadata.shared, **found}


def binary_of(launch: Launch, target: str) -> Any:
    """Compiled as the run time would: same specialisation of arguments equal to 1 or divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.args.get(name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = launch.options | {"enable_fp_fusion": adn_kernels.launch.FP_FUSION}
    if TARGETS[target].backend == "hip":
        options["num_stages"] = min(options.get("num_stages", 2), 2)
    return triton.compile(source, target=TARGETS[target], options=options)


def dumped(binary: Any, what: str) -> str:
    """What cuobjdump says of a binary for NVIDIA: "--dump-resource-usage", or "-sass", its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def _read_nvidia(binary: Any) -> dict[str, Any]:
    """Registers and spills of the code, accesses of its PTX: ptxas keeps widths, and disassembling takes far longer."""
    usage, ptx = dumped(binary, "--dump-resource-usage"), binary.asm["ptx"]
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    copied = Counter(int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx))
    return {
        "registers": registers,
        "spills": stack + local,
        "loads": dict(_widths(ptx, "ld") + copied),
        "stores": dict(_widths(ptx, "st")),
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
    }


def _widths(ptx: str, kind: str) -> Counter[int]:
    """In bytes, of accesses to global memory."""
    found = re.findall(rf"\b{kind}\.global(?:\.[a-zA-Z_:0-9]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


def _read_amd(binary: Any) -> dict[str, Any]:
    text = binary.asm["amdgcn"]
    number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
              for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")}
    size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8, "b32": 4}

    def widths(kind: str) -> dict[int, int]:
        found = Counter(re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text))
        return dict(sum((Counter({size.get(name, 2): n}) for name, n in found.items()), Counter()))

    return {
        "registers": number["vgpr_count"],
        # Spilled scalar registers go to vector registers, not to memory.
        "spills": number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        "loads": widths("load"),
        "stores": widths("store"),
        "mma": text.count("v_mfma"),
    }
