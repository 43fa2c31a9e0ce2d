"""What every op has to pass, whatever it computes: opcheck, compilation, export, tracing its GPU branch without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing import assert_close

Function = Callable[..., Any]


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def run(function: Function, args: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs of `function(*args)` and the gradients of all arguments, from a fixed random gradient of the output."""
    args = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad),
        tuple(args),
    )
    outputs = _leaves(function(*args))
    wanted = [y for y in outputs if y.requires_grad]
    if wanted:
        generator = torch.Generator().manual_seed(7)
        torch.autograd.backward(wanted, [torch.randn(y.shape, generator=generator).to(y) for y in wanted])
    return [y.detach() for y in outputs], [a.grad for a in _leaves(args)]


def check_compile(function: Function, make_args: Callable[[int], Sequence[Any]], backend: str = "aot_eager") -> None:
    """Compiled as one graph, forward and backward equal eager; of three batch sizes only the second recompiles.

    Args:
        make_args: batch size -> arguments.
    """
    compilations = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    try:
        compiled = torch.compile(function, backend=counting, fullgraph=True)
        for batch in (4, 6, 10):
            args = make_args(batch)
            expected, actual = run(function, args), run(compiled, args)
            assert_close(actual, expected, equal_nan=True)
            strides = [[t.stride() for t in side[0]] for side in (actual, expected)]
            assert strides[0] == strides[1], f"strides {strides[0]}, eager {strides[1]}"
        assert compilations <= 2, f"{compilations} compilations for three batch sizes"
    finally:
        torch._dynamo.reset()


def check_export(function: Function, make_args: Callable[[int], Sequence[Any]], dynamic: Sequence[int] = (0,)) -> None:
    """`torch.export` with a dynamic batch computes what eager does, at another batch size.

    Args:
        make_args: batch size -> arguments, tensors or None, the batch the first axis of those in `dynamic`.
    """

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    args = make_args(4)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if i in dynamic else None for i in range(len(args)))
    with torch.no_grad():
        program = torch.export.export(Module(), tuple(args), dynamic_shapes=(shapes,))
        other = make_args(6)
        assert_close(_leaves(program.module()(*other)), _leaves(function(*other)), equal_nan=True)


def check_fake_gpu(function: Function, args: Sequence[Any], dynamic: Sequence[int] = (0,)) -> None:
    """The GPU branch, traced with fake CUDA tensors of a symbolic batch: shapes, dtypes and strides are those of the
    CPU, and every guard on the batch holds for other batches too.

    Args:
        args: CPU arguments; the batch is the first axis of the tensors numbered by `dynamic`, at least 3.
    """
    expected = _leaves(function(*args))
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(i: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [DimDynamic.DYNAMIC if i in dynamic and d == 0 else DimDynamic.STATIC for d in range(value.ndim)]
        symbolic = mode.from_tensor(value.detach(), source=ConstantSource(f"arg{i}"),
                                    symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        with mode:
            return torch.empty_strided(symbolic.shape, symbolic.stride(), dtype=value.dtype, device="cuda",
                                       requires_grad=value.requires_grad)

    def hint(size: int | torch.SymInt) -> int:
        return size.node.hint if isinstance(size, torch.SymInt) else size

    inputs = [fake(i, a) for i, a in enumerate(args)]
    with mode:
        outputs = _leaves(function(*inputs))
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, expected):
        assert (got.device.type, got.dtype) == ("cuda", want.dtype)
        assert [hint(s) for s in got.shape] == list(want.shape)
        assert [hint(s) for s in got.stride()] == list(want.stride())
    for guard in env.guards:
        for batch in (2, 3, 7, 64, 1000):
            held = guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, batch))
            assert held, f"guard {guard.expr} fails for a batch of {batch}"
