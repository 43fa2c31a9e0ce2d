"""What `adn_kernels.private` takes for granted about functions of torch that are not public, one test each.

A failure here says what a new version of torch changed, before it shows as something else in a user's run.
"""

from __future__ import annotations

import ast
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import adn
import adn_kernels
from adn_kernels import private
from adn_kernels.activation import act_reference

VERSION = f"torch {torch.__version__}: "


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- one place


def test_nothing_else_names_what_is_private() -> None:
    """No `torch._x`, `torch.x._y` nor an import of one, outside of `private.py`."""
    found = []
    for package in (adn, adn_kernels):
        for path in Path(package.__file__).parent.rglob("*.py"):
            if path == Path(private.__file__):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.Attribute):
                    names = [ast.unparse(node)]
                found += [f"{path.name}:{node.lineno} {name}" for name in names if name.startswith("torch.") and any(
                    part.startswith("_") and not part.startswith("__") for part in name.split("."))]
    assert not found, "to be moved to adn_kernels/private.py: " + ", ".join(found)


# ----------------------------------------------------------------------------------------------------------- autograd


def test_graph_task_tells_backward_from_forward() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(private.graph_task()))
    assert private.graph_task() == -1, VERSION + "_current_graph_task_id is not -1 outside of a backward"
    y.sum().backward()
    assert seen[0] >= 0, VERSION + "_current_graph_task_id does not show that a backward runs"
    assert private.graph_task() == -1


def test_nodes_carry_the_number_they_were_made_at() -> None:
    """In each thread by itself, each node one more; the node being differentiated is known in a checkpoint."""
    x = torch.ones(2, requires_grad=True)
    first = private.next_sequence_number()
    y = x * 2
    assert y.grad_fn._sequence_nr() == first, VERSION + "a node does not take the next number"
    assert private.next_sequence_number() == first + 1, VERSION + "a node does not take one number"
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(private.next_sequence_number()))
    thread.start()
    thread.join()
    assert elsewhere[0] <= first, VERSION + "threads do not count by themselves"

    recomputed = []

    def body(x: torch.Tensor) -> torch.Tensor:
        if private.graph_task() != -1:
            recomputed.append(private.autograd_node()._sequence_nr())
        return x.sin().cos()

    before = private.next_sequence_number()
    z = checkpoint(body, x, use_reentrant=False)
    after = private.next_sequence_number()
    z.sum().backward()
    assert private.autograd_node() is None, VERSION + "_current_autograd_node is not None outside of a backward"
    assert before <= recomputed[0] < after, VERSION + "the node differentiated is not of the forward recomputed"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_in_a_reentrant_one_is_known(reentrant: bool) -> None:
    seen = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        if private.graph_task() != -1 and private.autograd_node() is not None:
            seen.append(private.in_reentrant_checkpoint())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda x: checkpoint(inner, x, use_reentrant=False), x, use_reentrant=reentrant)
    assert not private.in_reentrant_checkpoint()
    y.sum().backward()
    assert seen[-1] == reentrant, VERSION + "CheckpointFunction.backward does not call torch.autograd.backward"


def test_versions_count_writes() -> None:
    x = torch.zeros(3)
    before = private.version(x)
    x.add_(1)
    assert private.version(x) == before + 1, VERSION + "a write in place does not count"
    with torch.inference_mode(), pytest.raises(RuntimeError):
        private.version(torch.zeros(3))


def test_is_alias() -> None:
    for mode in (FakeTensorMode(), torch.no_grad()):
        with mode:
            x = torch.empty(4, 4)
            assert private.is_alias(x, x[1:, 2:]), VERSION + "a view is no alias"
            assert not private.is_alias(x, x.clone()), VERSION + "a copy is an alias"


def test_memory_format_of_slices() -> None:
    x = torch.empty(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)[:, :4]
    assert private.suggest_memory_format(x) == torch.channels_last, VERSION + "a slice of NHWC is not NHWC"
    assert private.suggest_memory_format(torch.empty(2, 8, 3, 3)[:, :4]) == torch.contiguous_format


def test_many_at_once() -> None:
    to = [torch.zeros(3), torch.zeros(2, dtype=torch.int64)]
    private.copy_all(to[:1], [torch.arange(3.0)])
    private.add_all(to, [1, 2])
    assert to[0].tolist() == [1, 2, 3], VERSION + "_foreach_copy_ or _foreach_add_"
    assert to[1].tolist() == [2, 2], VERSION + "_foreach_add_ of integers"
    private.lerp_all(to[:1], [torch.zeros(3)], 0.25)
    assert to[0].tolist() == [0.75, 1.5, 2.25], VERSION + "_foreach_lerp_"


def test_pytree_keeps_what_are_no_tensors() -> None:
    tree = {"a": [torch.ones(1), 3], "b": (None,)}
    doubled = private.pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, tree)
    assert doubled["a"][0].item() == 2
    assert doubled["a"][1] == 3
    assert doubled["b"] == (None,)
    assert private.pytree.tree_leaves(tree)[1] == 3


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.usefixtures("dynamo")
def test_constants_are_asked_once_while_tracing() -> None:
    asked = []

    @private.constant
    def answer() -> int:
        asked.append(1)
        return 3

    compiled = torch.compile(lambda x: x + answer(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == compiled(torch.ones(1)).item() == 4
    assert len(asked) == 1, VERSION + "_dynamo_marked_constant is not looked at"


@pytest.mark.usefixtures("dynamo")
def test_what_is_not_traced_may_call_what_is_compiled() -> None:
    """The mechanism of `adn.core.regions`: dispatch outside of compiled code, regions inside; flags are no guards."""
    flag = [False]
    double = torch.compile(lambda x: 2 * x, backend="eager")
    triple = torch.compile(lambda x: 3 * x, backend="eager")

    @private.not_traced
    def dispatch(x: torch.Tensor) -> torch.Tensor:
        return triple(x) if flag[0] else double(x)

    compiled = torch.compile(lambda x: dispatch(x + 1), backend="eager")

    def sweep() -> list[float]:
        found = []
        for flag[0] in (False, True):
            found.append(compiled(torch.ones(1)).item())
        return found

    first = private.compilations(lambda: sweep() == [4, 6] or pytest.fail("wrong"))
    assert {m.co_name for m in first} >= {"<lambda>"}, VERSION + "compilations are not recorded"
    assert not any(m.co_name == "dispatch" for m in first), VERSION + "decorators.skip does not skip"
    assert not private.compilations(sweep), VERSION + "a flag outside of compiled code compiles again"


@pytest.mark.usefixtures("dynamo")
def test_unseen_code_is_left_alone_where_python_calls_it() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    private.unseen(inner)
    alone = private.compilations(lambda: torch.compile(inner, backend="eager")(torch.ones(1)))
    assert not [m for m in alone if m.co_name == "inner"], VERSION + "skip_code does not keep Dynamo away"
    within = torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(within(torch.ones(1)), torch.ones(1).sin() + 1), VERSION + "skip_code keeps callers away"


@pytest.mark.usefixtures("dynamo")
def test_graph_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x + 1

    before = private.graph_breaks()
    torch.compile(broken, backend="eager")(torch.ones(1))
    assert private.graph_breaks() == before + 1, VERSION + 'counters["graph_break"]'


@pytest.mark.usefixtures("dynamo")
def test_compile_in_place_and_back() -> None:
    """The module stays itself; a copy of it is not compiled."""
    class Net(nn.Linear):  # with a forward of its own: torch 2.11 does not compile those of torch.nn
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sin()

    net = Net(2, 2)
    calls = []
    private.compile_in_place(net, lambda call: lambda *args: calls.append(1) or call(*args), backend="eager")
    x = torch.ones(1, 2)
    assert len(private.compilations(lambda: net(x))) == 1, VERSION + "_compiled_call_impl is not called"
    assert calls == [1]
    assert list(net.state_dict()) == ["weight", "bias"]
    copy.deepcopy(net)(x)
    assert calls == [1], VERSION + "a copy runs the compiled call of the original"
    private.forget_compiled(net)
    net(x)
    assert calls == [1], VERSION + "_compiled_call_impl = None does not undo it"


def test_wrapped_nets_are_known() -> None:
    net = nn.Linear(2, 2)
    wrapped = torch.compile(net, backend="eager")
    assert private.is_wrapped(wrapped), VERSION + "torch.compile returns no OptimizedModule"
    assert not private.is_wrapped(net)
    assert wrapped._modules["_orig_mod"] is net, VERSION + "it does not hold the net as `_orig_mod`"


def test_recompile_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=5):
        assert private.recompile_limit() == 5, VERSION + "recompile_limit has another name"


def test_cpp_compiler_fault() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert private.cpp_compiler_fault() is not None, VERSION + "InvalidCxxCompiler is not raised without a compiler"


class Annotated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


def test_graphs_without_annotations_can_be_pickled() -> None:
    traced = fx.symbolic_trace(Annotated())
    for node in traced.graph.nodes:
        private.forget_annotations(node)
    traced.recompile()
    again = pickle.loads(pickle.dumps(traced))
    assert again(-torch.ones(1)).item() == 0, VERSION + "a traced graph cannot be pickled"


# ------------------------------------------------------------------------------------------------------------- oneDNN


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", private._ATTRIBUTES)
def test_onednn(activation: str, residual: bool, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 3, 3, 3, generator=generator), torch.randn(8, generator=generator)
    place = (1, 1), (1, 1), (1, 1), 2
    added = torch.randn(2, 8, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    packed = private.pack_weight(weight, *place, x.shape)
    y = act_reference(*private.conv_pointwise(x, packed, bias, place, added if residual else None, activation))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *place) + (added.double() if residual else 0)
    torch.testing.assert_close(y.double(), act_reference(exact, activation), rtol=1e-4, atol=1e-5,
                               msg=lambda m: f"{VERSION}mkldnn._convolution_pointwise: {m}")
