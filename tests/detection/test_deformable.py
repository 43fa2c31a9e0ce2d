"""Deformable attention as a module, against the reference's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adn.models.rtdetr.deformable import DeformableAttention
from adn_kernels import ops

SHAPES = ((5, 7), (3, 4), (1, 2))
TOKENS = sum(height * width for height, width in SHAPES)


@pytest.fixture
def case(golden, seeded) -> tuple[dict, dict[str, np.ndarray], dict[str, Tensor], tuple]:
    """Manifest, arrays, inputs in float64, shapes."""
    manifest, arrays = golden("rtdetr_msdeform_attn")
    inputs = {name: seeded.seeded_input(spec, manifest["seed"]).double() for name, spec in manifest["inputs"].items()}
    return manifest, arrays, inputs, tuple(map(tuple, manifest["configs"][0]["spatial_shapes"]))


def compare(found: dict[str, Tensor], arrays: dict[str, np.ndarray], part: str, dtype: torch.dtype) -> None:
    """With all that the fixture has of a part; in float32 to its tolerance, in float64 as exactly as it is stored."""
    expected = {key.removeprefix(part): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(part)}
    assert found.keys() == expected.keys()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-6}
    for name, want in expected.items():
        assert_close(found[name].float(), want, **tolerance, msg=lambda text, name=name: f"{part}{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part", ["boxes4/", "points2/"])
def test_reference_numbers(part: str, dtype: torch.dtype, case, seeded) -> None:
    manifest, arrays, inputs, shapes = case
    config = manifest["configs"][0]
    module = DeformableAttention(config["embed_dim"], config["num_heads"], config["num_levels"], config["num_points"])
    module.load_state_dict(seeded.reference_state(manifest), strict=True)
    module.to(dtype)
    u = inputs["ref_u"]
    if part == "boxes4/":
        reference = torch.cat([u[..., :2], 0.05 + 0.6 * u[..., 2:]], -1)
    else:
        reference = u[..., :2].repeat(1, 1, config["num_levels"], 1)
    query, value, reference = (x.to(dtype).requires_grad_() for x in (inputs["query"], inputs["value"], reference))
    out = module(query, reference, value, shapes)
    (out * inputs["grad_out"].to(dtype)).sum().backward()
    found = {"out": out.detach(), "grad_query": query.grad, "grad_value": value.grad}
    if part == "boxes4/":
        found |= {"grad_ref": reference.grad}
        found |= {f"grad_param/{name}": p.grad for name, p in module.named_parameters()}
    compare(found, arrays, part, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_numbers_of_the_op(dtype: torch.dtype, case) -> None:
    _, arrays, inputs, shapes = case
    logits = inputs["core_weight_logits"]
    leaves = {
        "grad_value": inputs["core_value"], "grad_loc": 1.3 * inputs["core_loc_u"] - 0.15,
        "grad_weight": logits.softmax(-1).view(*logits.shape[:3], len(shapes), -1),
    }
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    value, locations, weights = leaves.values()
    out = ops.deformable_attention(value, shapes, locations, weights)
    (out * inputs["grad_out"].to(dtype)).sum().backward()
    compare({"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}, arrays, "core/", dtype)


def small(batch: int = 2, queries: int = 3) -> tuple[DeformableAttention, Tensor, Tensor, Tensor]:
    """Module, query, boxes and value."""
    torch.manual_seed(0)
    module = DeformableAttention(12, heads=3, levels=3, points=2)
    return module, torch.randn(batch, queries, 12), torch.rand(batch, queries, 1, 4), torch.randn(batch, TOKENS, 12)


def test_initialisation() -> None:
    """Eight directions on the edge of a square, farther point by point, whatever the query; all points count alike."""
    module = DeformableAttention(16, heads=8, levels=2, points=3)
    offsets = module.sampling_offsets(torch.randn(16)).view(8, 2, 3, 2)
    expected = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    for point in range(3):
        assert_close(offsets[:, :, point], expected[:, None].expand(-1, 2, -1) * (point + 1.0), atol=1e-5, rtol=0)
    assert not module.attention_weights(torch.randn(16)).any()
    assert not module.value_proj.bias.any()
    assert not module.output_proj.bias.any()
    bound = (6 / 32) ** 0.5
    for projection in (module.value_proj, module.output_proj):
        assert 0.8 * bound < projection.weight.abs().max() <= bound


def test_of_a_constant_map_only_the_projections_are_seen() -> None:
    """Weights have sum 1: where all points lie inside, their places do not matter."""
    module, query, *_ = small()
    value = torch.randn(2, 1, 12)
    middle = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(2, 3, 1, 4)
    out = module(query, middle, value.expand(-1, 35 + 9 + 15, -1), ((5, 7), (3, 3), (3, 5)))
    assert_close(out, module.output_proj(module.value_proj(value)).expand(-1, 3, -1))


def test_boxes_for_each_level_or_one_for_all() -> None:
    module, query, boxes, value = small()
    one = module(query, boxes, value, SHAPES)
    assert_close(module(query, boxes.expand(-1, -1, 3, -1).contiguous(), value, SHAPES), one)
    points = module(query, boxes[..., :2], value, SHAPES)
    assert_close(module(query, boxes[..., :2].expand(-1, -1, 3, -1), value, SHAPES), points)
    others = boxes.repeat(1, 1, 3, 1)
    others[:, :, 2, :2] = 0.5
    assert not torch.allclose(module(query, others, value, SHAPES), one)


def test_offsets_of_points_are_in_pixels() -> None:
    """One pixel to the right on every level, where a value counts the columns."""
    module = DeformableAttention(1, heads=1, levels=2, points=1)
    shapes = ((4, 8), (2, 4))
    columns = torch.cat([torch.arange(float(w)).repeat(h) for h, w in shapes])[None, :, None]
    with torch.no_grad():
        for projection in (module.value_proj, module.output_proj):
            projection.weight.fill_(1)
        module.sampling_offsets.bias.copy_(torch.tensor([1.0, 0, 1.0, 0]))
        at_middle = module(torch.zeros(1, 1, 1), torch.full((1, 1, 1, 2), 0.5), columns, shapes)
    # Between columns 3 and 4 of 8, and 1 and 2 of 4; each moved by 1.
    assert_close(at_middle.item(), (4.5 + 2.5) / 2)


def test_no_queries_and_no_images() -> None:
    module, *_ = small()
    for batch, queries in ((2, 0), (0, 3)):
        _, query, boxes, value = small(batch, queries)
        out = module(query, boxes, value, SHAPES)
        assert out.shape == (batch, queries, 12)
        out.sum().backward()


def test_half_precision_keeps_places() -> None:
    """Locations are of float32 whatever the module is."""
    module, query, boxes, value = small()
    expected = module(query, boxes, value, SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(query, boxes, value, SHAPES)
    half = module.bfloat16()(query.bfloat16(), boxes, value.bfloat16(), SHAPES)
    assert mixed.dtype == half.dtype == torch.bfloat16
    assert_close(mixed.float(), expected, atol=3e-2, rtol=0)
    assert_close(half.float(), expected, atol=3e-2, rtol=0)


class Net(torch.nn.Module):
    def __init__(self, attention: DeformableAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, boxes: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, boxes, value, SHAPES)


def test_compile_and_export() -> None:
    module, *inputs = small()
    net, expected = Net(module), module(*inputs, SHAPES)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected)
    gradients = [torch.autograd.grad(f(*inputs).square().sum(), module.parameters()) for f in (compiled, net)]
    assert_close(*gradients)
    program = torch.export.export(net, tuple(inputs), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 3)
    _, *others = small(5)
    assert_close(program.module()(*others), net(*others))


def test_in_a_traced_graph_it_is_one_node() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, DeformableAttention) or super().is_leaf_module(module, name)

    module, *inputs = small()
    net = Net(module)
    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    assert_close(graph(*inputs), net(*inputs))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=10 is no multiple of heads=3"):
        DeformableAttention(10, heads=3)
    module, query, boxes, value = small()
    with pytest.raises(ValueError, match="built for 3 levels"):
        module(query, boxes, value, SHAPES[:2])
    with pytest.raises(ValueError, match=r"pass boxes \(.., 4\) or points"):
        module(query, boxes[..., :3], value, SHAPES)
    with pytest.raises(ValueError, match="pass the shapes that the tokens come from"):
        module(query, boxes, value[:, 1:], SHAPES)
