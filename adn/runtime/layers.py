"""The layers of a deploy form: a convolution or a norm with all that follows it, as one call.

Each reads the parameters of the modules it stands for (`refresh`) and keeps them folded. In evaluation mode only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adn_kernels import ops, private
from adn_kernels.activation import act_reference
from adn_kernels.conv import choose

from ..core.trace import hooked
from .norms import activation_in, evenly_spaced


def split_norm(module: nn.Module) -> str | None:
    """The activation that a batch norm with running statistics ends with ("identity" if with none); None for any other
    module."""
    activation = activation_in(module)
    if activation is None or module.running_mean is None or any(map(hooked, module.modules())):
        return None
    return activation


def is_plain_conv(module: nn.Module | None) -> bool:
    """A convolution that computes `F.conv2d` of zero-padded input with its parameter, as opposed to a subclass, a hook
    or a reparametrisation that does more."""
    return (type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
            and "weight" in module._parameters and not hooked(module))


def is_square(conv: nn.Conv2d) -> bool:
    """Are both sides treated alike, as the ops want it?"""
    return conv.stride[0] == conv.stride[1] and conv.padding[0] == conv.padding[1] and conv.dilation == (1, 1)


def conv_shape(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
               ) -> tuple[int, ...]:
    """Of the result of a convolution; a residual of another would be broadcast, which ops do not do."""
    n, _, height, width = x.shape
    channels, _, kh, kw = weight.shape
    return (n, channels, (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1,
            (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1)


class Layer(nn.Module):
    """Base: what it holds is computed from other modules, which are not its children."""

    def refresh(self) -> None:
        """Read the parameters again, into the memory that holds them already."""

    def _keep(self, name: str, value: Tensor) -> None:
        """Set a buffer; in place if there is one, as a captured graph would go on reading its memory."""
        held = self._buffers.get(name)
        if held is None or held.shape != value.shape or held.dtype != value.dtype or held.device != value.device:
            self.register_buffer(name, value)
        else:
            held.copy_(value)


def folded_norm(norm: nn.Module, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ops.fold_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, conv_bias)


class ConvNormAct(Layer):
    """`act(norm(conv(x)) + residual)`, the norm, if there is one, folded into the convolution's weight and bias; with a
    second norm, for each sample (`bank`) with one of the two, as scale and shift."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, activation: str, second: nn.Module | None = None
                 ) -> None:
        super().__init__()
        self.activation = activation
        self.place = conv.stride, conv.padding, conv.dilation, conv.groups
        self.__dict__["source"] = conv, norm, second
        self.packed: Tensor | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        conv, norm, second = self.source
        if second is not None:
            for i, either in enumerate((norm, second)):
                for name, vector in zip(("scale", "shift"), folded_norm(either, conv.bias)):
                    self._keep(f"{name}{i}", vector)
            return
        if norm is None:
            bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
            weight = conv.weight
        else:
            weight, bias = ops.fold(conv.weight, *folded_norm(norm, conv.bias))
        self._keep("weight", ops.lay_out(weight, conv.groups).detach())
        self._keep("bias", bias.detach())
        self.packed = None

    def forward(self, x: Tensor, residual: Tensor | None = None, *, bank: Tensor | None = None,
                into: tuple[Tensor | None, int] | None = None) -> Tensor:
        """`into`, a tensor and a channel: from there on in it the result is written, if a Triton kernel computes it and
        it is of that type."""
        if residual is not None and tuple(residual.shape) != conv_shape(x, self.source[0].weight, *self.place[:3]):
            return act_reference(self._convolve(x, None, "identity", bank) + residual, self.activation)
        if into is not None and into[0] is not None and self._can_write(x, residual):
            stride, padding, _, groups = self.place
            out = into[0].narrow(1, into[1], self.weight.shape[0])
            return ops.conv_(out, x, self.weight, self.bias, residual=residual, activation=self.activation,
                             stride=stride[0], padding=padding[0], groups=groups)
        return self._convolve(x, residual, self.activation, bank)

    def _can_write(self, x: Tensor, residual: Tensor | None) -> bool:
        if not is_square(self.source[0]) or (residual is not None and residual.dtype != x.dtype):
            return False
        stride, padding, _, groups = self.place
        return choose(x, self.weight, None, residual, None, self.activation, stride[0], padding[0], groups,
                      None) == "triton"

    def _convolve(self, x: Tensor, residual: Tensor | None, activation: str, bank: Tensor | None) -> Tensor:
        # A compiler has no use for weights in oneDNN's own layout.
        if bank is None and x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            if self.packed is None:
                self.packed = private.pack_weight(self.weight, *self.place, x.shape)
            if self.packed is not False:
                y, rest = private.conv_pointwise(x, self.packed, self.bias, self.place, residual, activation)
                return y if rest == "identity" else act_reference(y, rest)
        conv = self.source[0]
        if bank is None and not (x.is_cuda and is_square(conv)):
            y = F.conv2d(x, self.weight, self.bias, *self.place)
            return act_reference(y if residual is None else y + residual, activation)
        if bank is None:
            affine = self.weight, None, self.bias
        else:
            affine = conv.weight, (self.scale0, self.scale1), (self.shift0, self.shift1)
            if not is_square(conv):
                zero, one = torch.zeros_like(self.scale0), torch.ones_like(self.scale0)
                return ops.batch_norm_eval(F.conv2d(x, conv.weight, None, *self.place), *affine[1:], (zero, zero),
                                           (one, one), residual=residual, activation=activation, eps=0.0, bank=bank)
        return ops.conv(x, *affine, residual=residual, activation=activation, stride=conv.stride[0],
                        padding=conv.padding[0], groups=conv.groups, bank=bank)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "packed": None}  # its layout cannot be copied

    def extra_repr(self) -> str:
        shape = tuple(self.source[0].weight.shape)
        return f"{shape}, stride={self.place[0]}, groups={self.place[3]}, {self.activation}"


class RepConvNormAct(ConvNormAct):
    """`act(norm(conv(x)) + norm'(conv'(x)))` with a 1x1 convolution beside it, as one convolution (RepVGG)."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, conv1x1: nn.Conv2d, norm1x1: nn.Module, activation: str
                 ) -> None:
        self.__dict__["beside"] = conv1x1, norm1x1
        super().__init__(conv, norm, activation)

    @torch.no_grad()
    def refresh(self) -> None:
        conv, norm, _ = self.source
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        (weight, bias), (center, shift) = (ops.fold(c.weight.to(wide), *folded_norm(n, c.bias))
                                           for c, n in ((conv, norm), self.beside))
        margin = conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]
        weight = (weight + F.pad(center, margin)).to(conv.weight.dtype)
        self._keep("weight", ops.lay_out(weight, conv.groups))
        self._keep("bias", (bias + shift).to(conv.weight.dtype))
        self.packed = None

    @staticmethod
    def fits(conv: nn.Conv2d, conv1x1: nn.Conv2d) -> bool:
        """Does the pixel that the 1x1 convolution reads lie in the middle of what the other reads?"""
        return (conv1x1.kernel_size == (1, 1) and conv1x1.padding == (0, 0) and conv.dilation == (1, 1)
                and conv.stride == conv1x1.stride and conv.groups == conv1x1.groups
                and all(size == 2 * pad + 1 for size, pad in zip(conv.kernel_size, conv.padding)))


class NormAct(Layer):
    """`act(norm(x) + residual)`, a batch norm with fixed statistics that no convolution precedes; with a second norm,
    for each sample (`bank`) one of the two."""

    def __init__(self, norm: nn.Module, activation: str, second: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.__dict__["source"] = norm, second

    def forward(self, x: Tensor, residual: Tensor | None = None, *, bank: Tensor | None = None) -> Tensor:
        norm, second = self.source
        if bank is None and not (x.is_cuda and x.ndim == 4):
            y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
            return act_reference(y if residual is None else y + residual, self.activation)
        names = ("weight", "bias", "running_mean", "running_var")
        vectors = [getattr(norm, name) for name in names]
        if bank is not None:
            vectors = [None if own is None else (own, getattr(second, name)) for own, name in zip(vectors, names)]
        fits = residual is None or residual.shape == x.shape  # another would be broadcast, which ops do not do
        y = ops.batch_norm_eval(
            x if x.ndim == 4 else x[..., None, None], *vectors, residual=residual if fits else None,
            activation=self.activation if fits else "identity", eps=norm.eps, bank=bank).reshape(x.shape)
        return y if fits else act_reference(y + residual, self.activation)

    def extra_repr(self) -> str:
        return f"{self.source[0].running_mean.numel()}, {self.activation}"


class AddLayerNorm(Layer):
    """`s = a + b; norm(s), s`; with a `bank` by the norm or by its second set.

    With a `shape`, in the arguments of `reshape`, that of the sum before it is normalised.
    """

    def __init__(self, norm: nn.LayerNorm, second: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.__dict__["source"] = norm, second

    def forward(self, a: Tensor, b: Tensor | None = None, *, shape: tuple | None = None, bank: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
        norm, second = self.source
        if bank is None:
            weight, bias = norm.weight, norm.bias
        else:
            weight, bias = (norm.weight, second.weight), (norm.bias, second.bias)
            weight, bias = (None if pair[0] is None else pair for pair in (weight, bias))
        if b is not None and (a.shape != b.shape or not a.is_cuda):
            a, b = a + b, None
        if shape is not None:
            a, b = (t if t is None else t.reshape(*shape) for t in (a, b))
        if bank is None and not a.is_cuda:
            return F.layer_norm(a, norm.normalized_shape, weight, bias, norm.eps), a
        a, b = (t if t is None or evenly_spaced(t) else t.contiguous() for t in (a, b))
        y = ops.layer_norm(a, weight, bias, residual=b, eps=norm.eps, bank=bank)
        return y if b is not None else (y, a)
