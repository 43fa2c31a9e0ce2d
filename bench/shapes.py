"""The layers of five networks, as the kernel benchmarks need them: every distinct one with how often it occurs.

ResNet-50, MobileNetV2 and Swin-T at 224x224 are read off timm's models, run on the meta device. RT-DETR-R50 and
YOLOv12-L at 640x640 are written down here: no library that has them is a dependency.

    python bench/shapes.py      # prints them
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from common import columns
from torch import nn

BATCHES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with the norm (or, if `norm` is false, only a bias), residual and activation after it.

    Attributes:
        count: how many such layers the network has.
        inputs, channels: C in, C out.
        side: height and width of the input.
    """

    network: str
    name: str
    count: int
    inputs: int
    channels: int
    side: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str = "identity"
    residual: bool = False
    norm: bool = True

    @property
    def out_side(self) -> int:
        padding = 0 if self.kernel % 2 == 0 else self.kernel // 2
        return (self.side + 2 * padding - self.kernel) // self.stride + 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.inputs == self.channels and self.kernel > 1

    @property
    def weights(self) -> int:
        return self.channels * self.inputs // self.groups * self.kernel ** 2


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch norm with the residual and activation after it; `side` is height and width."""

    network: str
    name: str
    count: int
    channels: int
    side: int
    activation: str
    residual: bool


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """Of `rows` tokens per image; with `residual`, of the sum of a stream and a branch."""

    network: str
    name: str
    count: int
    rows: int
    channels: int
    residual: bool


@dataclasses.dataclass(frozen=True)
class Linear:
    """Over `rows` tokens per image, always with a bias."""

    network: str
    name: str
    count: int
    rows: int
    inputs: int
    channels: int
    activation: str = "identity"
    residual: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        kind: "bottleneck" or "inverted_residual".
        shortcut: "identity", "conv" (1x1), or "none".
    """

    network: str
    name: str
    count: int
    kind: str
    inputs: int
    hidden: int
    channels: int
    side: int
    stride: int
    shortcut: str
    activation: str


@dataclasses.dataclass(frozen=True)
class Deformable:
    """Deformable attention of `queries` per image: `points` of each head, of `dim` channels, on each level of
    `sides`."""

    network: str
    name: str
    count: int
    queries: int
    heads: int
    dim: int
    points: int
    sides: tuple[int, ...]


Layer = Conv | Norm | LayerNorm | Linear | Block | Deformable


@functools.cache
def layers(network: str) -> tuple[Layer, ...]:
    """Every distinct layer of a network of `NETWORKS`, in order; named like the first of its kind."""
    found = list(NETWORKS[network]())
    found += [Norm(c.network, c.name, c.count, c.channels, c.out_side, c.activation, c.residual)
              for c in found if isinstance(c, Conv) and c.norm]
    merged: dict[Layer, Layer] = {}
    for layer in found:
        key = dataclasses.replace(layer, name="", count=0)
        seen = merged.get(key)
        merged[key] = layer if seen is None else dataclasses.replace(seen, count=seen.count + layer.count)
    return tuple(merged.values())


def of(kind: type) -> Iterator[Any]:
    """The layers of one kind, of all networks."""
    return (layer for network in NETWORKS for layer in layers(network) if isinstance(layer, kind))


def _calls(model_name: str) -> list[tuple[str, nn.Module, torch.Size]]:
    """Name, module and shape of the input of every module without children or with a residual, as they are called."""
    calls = []
    with torch.device("meta"):
        model = timm.create_model(model_name).eval()
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda module, args, _, name=name: calls.append((name, module, args[0].shape)))
        model(torch.empty(1, 3, 224, 224))
    return calls


def _convolutional(network: str, model_name: str) -> Iterator[Layer]:
    calls = _calls(model_name)
    modules = {name: module for name, module, _ in calls}
    flat = [call for call in calls if isinstance(call[1], nn.Conv2d | nn.BatchNorm2d)]
    for (name, conv, shape), (norm_name, norm, _) in itertools.pairwise(flat):
        if not isinstance(conv, nn.Conv2d):
            continue
        block = modules.get(norm_name.rpartition(".")[0])
        # timm's BatchNormAct2d holds its activation; plain norms are those of ResNet.
        activation = type(norm.act).__name__.lower() if hasattr(norm, "act") else "relu"
        yield Conv(
            network, name, 1, conv.in_channels, conv.out_channels, shape[-1], conv.kernel_size[0], conv.stride[0],
            conv.groups, "identity" if "downsample" in name else activation,
            residual=norm is getattr(block, "bn3", None) and getattr(block, "has_skip", True))
    for name, module, shape in calls:
        if type(module).__name__ == "Bottleneck":
            yield Block(network, name, 1, "bottleneck", shape[1], module.conv1.out_channels, module.conv3.out_channels,
                        shape[-1], module.conv2.stride[0], "identity" if module.downsample is None else "conv", "relu")
        elif type(module).__name__ == "InvertedResidual":
            yield Block(network, name, 1, "inverted_residual", shape[1], module.conv_pw.out_channels,
                        module.conv_pwl.out_channels, shape[-1], module.conv_dw.stride[0],
                        "identity" if module.has_skip else "none", "relu6")


def _swin(network: str, model_name: str) -> Iterator[Layer]:
    for name, module, shape in _calls(model_name):
        rows = shape[:-1].numel()
        if isinstance(module, nn.LayerNorm):
            # A norm takes the sum that ends the branch before it; those that open a stage follow no branch.
            residual = name == "norm" or (".blocks." in name and not name.endswith("blocks.0.norm1"))
            yield LayerNorm(network, name, 1, rows, shape[-1], residual)
        elif isinstance(module, nn.Linear):
            yield Linear(network, name, 1, rows, module.in_features, module.out_features,
                         "gelu" if name.endswith("fc1") else "identity", residual=name.endswith("fc2"))


def _rtdetr_r50() -> Iterator[Layer]:
    """RT-DETR (lyuwenyu/RT-DETR, rtdetr_pytorch, Apache-2.0) on the any-depth ResNet-50-d: 7x7 stem, shortcuts that
    pool before their convolution."""
    network = "rtdetr_r50"

    def conv(name: str, inputs: int, channels: int, side: int, kernel: int = 1, count: int = 1, **kw: Any) -> Conv:
        return Conv(network, name, count, inputs, channels, side, kernel, **kw)

    yield conv("backbone.conv1", 3, 64, 640, 7, stride=2, activation="relu")
    for stage, (blocks, side) in enumerate(((3, 160), (4, 80), (6, 40), (3, 20))):
        name, width, stride = f"backbone.layer{stage + 1}", 64 << stage, 1 if stage == 0 else 2
        before = 64 if stage == 0 else 2 * width
        relu = {"activation": "relu"}
        yield conv(f"{name}.0.conv1", before, width, side * stride, **relu)
        yield conv(f"{name}.0.conv2", width, width, side * stride, 3, stride=stride, **relu)
        yield conv(f"{name}.0.downsample", before, 4 * width, side)
        yield conv(f"{name}.1.conv1", 4 * width, width, side, count=blocks - 1, **relu)
        yield conv(f"{name}.1.conv2", width, width, side, 3, count=blocks - 1, **relu)
        yield conv(f"{name}.0.conv3", width, 4 * width, side, count=blocks, residual=True, **relu)
        if stage == 0:  # the others pool in their shortcut
            yield Block(network, f"{name}.0", 1, "bottleneck", before, width, 4 * width, side, 1, "conv", "relu")
        yield Block(network, f"{name}.1", blocks - 1, "bottleneck", 4 * width, width, 4 * width, side, 1, "identity",
                    "relu")

    silu = {"activation": "silu"}
    for i, (inputs, side) in enumerate(((512, 80), (1024, 40), (2048, 20))):
        yield conv(f"encoder.input_proj.{i}", inputs, 256, side)
        yield conv(f"decoder.input_proj.{i}", 256, 256, side)
    for i, side in enumerate((20, 40)):
        yield conv(f"encoder.lateral_convs.{i}", 256, 256, side, **silu)
    for i, side in enumerate((80, 40)):
        yield conv(f"encoder.downsample_convs.{i}", 256, 256, side, 3, stride=2, **silu)
    for name, side in (("fpn_blocks.0", 40), ("fpn_blocks.1", 80), ("pan_blocks.0", 40), ("pan_blocks.1", 20)):
        yield conv(f"encoder.{name}.conv1", 512, 256, side, count=2, **silu)
        # silu(norm(conv3x3(x)) + norm(conv1x1(x)))
        yield conv(f"encoder.{name}.bottlenecks.0.conv1", 256, 256, side, 3, count=3, residual=True, **silu)
        yield conv(f"encoder.{name}.bottlenecks.0.conv2", 256, 256, side, count=3)

    memory, queries = 80 * 80 + 40 * 40 + 20 * 20, 300

    def linear(name: str, rows: int, inputs: int, channels: int, count: int = 1, **kw: Any) -> Linear:
        return Linear(network, name, count, rows, inputs, channels, **kw)

    def transformer(name: str, rows: int, activation: str, count: int) -> Iterator[Layer]:
        yield linear(f"{name}.self_attn.in_proj", rows, 256, 768, count)
        yield linear(f"{name}.self_attn.out_proj", rows, 256, 256, count)
        yield linear(f"{name}.linear1", rows, 256, 1024, count, activation=activation)
        yield linear(f"{name}.linear2", rows, 1024, 256, count)  # post-norm: its residual belongs to the norm
        yield LayerNorm(network, f"{name}.norm1", 2 * count, rows, 256, True)

    yield from transformer("encoder.encoder", 400, "gelu", 1)
    yield from transformer("decoder.layers.0", queries, "relu", 6)
    cross = "decoder.layers.0.cross_attn"
    yield linear(f"{cross}.value_proj", memory, 256, 256, 6)
    yield linear(f"{cross}.sampling_offsets", queries, 256, 8 * 3 * 4 * 2, 6)
    yield linear(f"{cross}.attention_weights", queries, 256, 8 * 3 * 4, 6)
    yield linear(f"{cross}.output_proj", queries, 256, 256, 6)
    yield Deformable(network, cross, 6, queries, 8, 32, 4, (80, 40, 20))
    yield LayerNorm(network, "decoder.layers.0.norm2", 6, queries, 256, True)
    yield linear("decoder.enc_output.0", memory, 256, 256)
    yield LayerNorm(network, "decoder.enc_output.1", 1, memory, 256, False)
    yield linear("decoder.query_pos_head.0", queries, 4, 512, activation="relu")
    yield linear("decoder.query_pos_head.1", queries, 512, 256)
    for name, rows, count in (("enc", memory, 1), ("dec", queries, 6)):
        yield linear(f"decoder.{name}_score_head", rows, 256, 80, count)
        yield linear(f"decoder.{name}_bbox_head.0", rows, 256, 256, 2 * count, activation="relu")
        yield linear(f"decoder.{name}_bbox_head.2", rows, 256, 4, count)


def _yolov12_l() -> Iterator[Layer]:
    """YOLOv12-L (arXiv:2502.12524) by its layer table: channels, kernels and strides; every norm is followed by SiLU
    except where said."""
    network = "yolov12_l"

    def conv(name: str, inputs: int, channels: int, side: int, kernel: int = 1, count: int = 1,
             activation: str = "silu", **kw: Any) -> Conv:
        return Conv(network, name, count, inputs, channels, side, kernel, activation=activation, **kw)

    def c3k(name: str, width: int, side: int, count: int) -> Iterator[Conv]:
        half = width // 2
        yield conv(f"{name}.cv1", width, half, side, count=2 * count)
        yield conv(f"{name}.m.0.cv1", half, half, side, 3, count=4 * count)
        yield conv(f"{name}.cv3", width, width, side, count=count)

    def c3k2(layer: int, inputs: int, width: int, channels: int, side: int) -> Iterator[Conv]:
        yield conv(f"{layer}.cv1", inputs, 2 * width, side)
        yield from c3k(f"{layer}.m.0", width, side, 2)
        yield conv(f"{layer}.cv2", 4 * width, channels, side)

    def attention(layer: int, side: int) -> Iterator[Conv]:
        identity = {"activation": "identity", "count": 8}
        yield conv(f"{layer}.cv1", 512, 256, side)
        yield conv(f"{layer}.m.0.0.attn.qk", 256, 512, side, **identity)
        yield conv(f"{layer}.m.0.0.attn.v", 256, 256, side, **identity)
        yield conv(f"{layer}.m.0.0.attn.pe", 256, 256, side, 5, groups=256, **identity)
        yield conv(f"{layer}.m.0.0.attn.proj", 256, 256, side, residual=True, **identity)
        yield conv(f"{layer}.m.0.0.mlp.0", 256, 384, side, count=8)
        yield conv(f"{layer}.m.0.0.mlp.1", 384, 256, side, residual=True, **identity)
        yield conv(f"{layer}.cv2", 5 * 256, 512, side)

    def a2c2f(layer: int, inputs: int, channels: int, side: int) -> Iterator[Conv]:
        width = channels // 2
        yield conv(f"{layer}.cv1", inputs, width, side)
        yield from c3k(f"{layer}.m.0", width, side, 2)
        yield conv(f"{layer}.cv2", 3 * width, channels, side)

    yield conv("0", 3, 64, 640, 3, stride=2)
    yield conv("1", 64, 128, 320, 3, stride=2, groups=2)
    yield from c3k2(2, 128, 64, 256, 160)
    yield conv("3", 256, 256, 160, 3, stride=2, groups=4)
    yield from c3k2(4, 256, 128, 512, 80)
    yield conv("5", 512, 512, 80, 3, stride=2)
    yield from attention(6, 40)
    yield conv("7", 512, 512, 40, 3, stride=2)
    yield from attention(8, 20)
    yield from a2c2f(11, 1024, 512, 40)
    yield from a2c2f(14, 1024, 256, 80)
    yield conv("15", 256, 256, 80, 3, stride=2)
    yield from a2c2f(17, 768, 512, 40)
    yield conv("18", 512, 512, 40, 3, stride=2)
    yield from c3k2(20, 1024, 256, 512, 20)
    for level, (inputs, side) in enumerate(((256, 80), (512, 40), (512, 20))):
        box, label = f"21.cv2.{level}", f"21.cv3.{level}"
        yield conv(f"{box}.0", inputs, 64, side, 3)
        yield conv(f"{box}.1", 64, 64, side, 3)
        yield conv(f"{box}.2", 64, 64, side, activation="identity", norm=False)
        yield conv(f"{label}.0.0", inputs, inputs, side, 3, groups=inputs)
        yield conv(f"{label}.0.1", inputs, 256, side)
        yield conv(f"{label}.1.0", 256, 256, side, 3, groups=256)
        yield conv(f"{label}.1.1", 256, 256, side)
        yield conv(f"{label}.2", 256, 80, side, activation="identity", norm=False)


NETWORKS = {
    "resnet50": lambda: _convolutional("resnet50", "resnet50"),
    "mobilenetv2": lambda: _convolutional("mobilenetv2", "mobilenetv2_100"),
    "swin_t": lambda: _swin("swin_t", "swin_tiny_patch4_window7_224"),
    "rtdetr_r50": _rtdetr_r50,
    "yolov12_l": _yolov12_l,
}


def main() -> None:
    for kind in (Conv, Norm, LayerNorm, Linear, Block, Deformable):
        rows = [[field.name for field in dataclasses.fields(kind)]]
        rows += [list(dataclasses.asdict(layer).values()) for layer in of(kind)]
        print(f"\n{kind.__name__}: {len(rows) - 1}\n{columns(rows)}")


if __name__ == "__main__":
    main()
