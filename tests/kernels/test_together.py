"""Ops of several files in one net: Inductor, torch.export and AOTInductor see through all of them, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from op_checks import run
from torch import Tensor, nn
from torch.testing import assert_close

from adn_kernels.batch_norm import batch_norm
from adn_kernels.batch_norm_eval import batch_norm_eval
from adn_kernels.conv import conv, conv_
from adn_kernels.layer_norm import layer_norm, layer_norm_
from adn_kernels.linear import linear_


class Net(nn.Module):
    """Both banks everywhere, `bank` an input: (N,) in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.rand(*shape) + 0.5)

        self.pointwise, self.dense = parameter(16, 8, 1, 1), parameter(16, 16, 3, 3)
        self.deep, self.head = parameter(16, 1, 5, 5), parameter(10, 16)
        self.weights = nn.ParameterList([parameter(16), parameter(16)])
        self.biases = nn.ParameterList([parameter(16), parameter(16)])
        for name in ("mean1", "var1", "mean2", "var2"):
            self.register_buffer(name, torch.rand(16) + 0.5)

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        weights, biases = tuple(self.weights), tuple(self.biases)
        h = conv(x, self.pointwise, weights, biases, activation="silu", bank=bank)
        h = conv(h, self.dense, weights, biases, residual=h, activation="relu", padding=1, bank=bank)
        h = batch_norm_eval(h, weights, biases, (self.mean1, self.mean2), (self.var1, self.var2),
                            activation="hardswish", eps=1e-5, bank=bank)
        h = conv(h, self.deep, weights, biases, activation="gelu", stride=2, padding=2, groups=16, bank=bank)
        h = conv_(h.clone(), h, self.dense, accumulate=True, padding=1, active=bank)
        h, total = layer_norm(h.flatten(2).transpose(1, 2), weights, biases, bank=bank,
                              residual=h.flatten(2).transpose(1, 2))
        h = layer_norm_(total.clone(), h, self.weights[0], None, active=bank)
        return linear_(h.new_zeros((*h.shape[:2], 10)), h, self.head, active=bank).mean(1)


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 8, 7, 9, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.arange(batch, dtype=torch.int32) % 2


@pytest.mark.full
def test_ahead_of_time(tmp_path: Path) -> None:
    net = Net().eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    with torch.no_grad():
        program = torch.export.export(net, inputs(4), dynamic_shapes=dynamic)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for batch in (4, 6):
            assert_close(compiled(*inputs(batch)), net(*inputs(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_training_step_with_inductor() -> None:
    net = Net()

    def loss(x: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, mean, var = batch_norm(x, weight, bias, net.mean1, net.var1, residual=x, activation="silu", groups=2)
        return F.mse_loss(y.mean((2, 3)), teacher), mean, var

    generator = torch.Generator().manual_seed(0)
    args = (torch.randn(4, 16, 5, 5, generator=generator, requires_grad=True), torch.randn(4, 16, generator=generator),
            net.weights[0], net.biases[0])
    expected = run(loss, args)
    torch._dynamo.reset()
    assert_close(run(torch.compile(loss, fullgraph=True), args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_any_batch(batch: int) -> None:
    with torch.no_grad():
        y = Net()(*inputs(batch))
    assert y.shape == (batch, 10)


def test_example_of_the_readme() -> None:
    text = (Path(__file__).parents[2] / "adn_kernels" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    torch.manual_seed(0)
    names = {name: torch.rand(8) for name in ("weight", "bias", "mean", "var")}
    names |= {name: torch.randn(2, 8, 5, 5) for name in ("x", "shortcut", "stream")}
    names["kernel"] = torch.randn(8, 8, 3, 3)
    before = names["stream"].clone()
    names["torch"] = torch
    exec(code, names)
    assert names["y"].shape == (2, 8, 5, 5)
    assert not names["stream"][0].equal(before[0])
    assert names["stream"][1].equal(before[1])
