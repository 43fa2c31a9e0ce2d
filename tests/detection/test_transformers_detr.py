"""RT-DETR of Hugging Face's `transformers`: its files in our nets, and its objects converted."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conftest import few, randomise
from torch import Tensor, nn
from torch.compiler import set_stance

import adn
from adn.core.errors import CheckpointError, ConversionError
from adn.core.kinds.stack import StackPlan
from adn.core.state import state_of
from adn.models.registry import interface_of
from adn.tasks import DETECT, is_detector, task_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NARROW = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64]}
NARROW_BOTTLENECKS = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256], "depths": [3, 4, 6, 3]}
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rtdetr_r18vd": ("basic", {"depths": [2, 2, 2, 2], "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]},
                     {"hidden_expansion": 0.5, "decoder_layers": 3, "encoder_in_channels": [128, 256, 512]}),
    "rtdetr_r34vd": ("basic", {"depths": [3, 4, 6, 3], "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]},
                     {"hidden_expansion": 0.5, "decoder_layers": 4, "encoder_in_channels": [128, 256, 512]}),
    "rtdetr_r50vd_m": ("bottleneck", {"depths": [3, 4, 6, 3]}, {"hidden_expansion": 0.5}),
    "rtdetr_r50vd": ("bottleneck", {"depths": [3, 4, 6, 3]}, {}),
    "rtdetr_r101vd": ("bottleneck", {"depths": [3, 4, 23, 3]},
                      {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384] * 3}),
}


def theirs(layer_type: str = "basic", backbone: dict[str, Any] | None = None, kind: str = "RTDetr", **changes: Any
           ) -> nn.Module:
    """One of 7 classes, in float64 and evaluation, with norms that differ."""
    torch.manual_seed(0)
    backbone = {"depths": [2, 2, 2, 2], **({} if backbone else NARROW), **(backbone or {})}
    config = transformers.RTDetrResNetConfig(layer_type=layer_type, out_features=["stage2", "stage3", "stage4"],
                                             **backbone)
    cls, config_cls = (getattr(transformers, f"{kind}{what}") for what in ("ForObjectDetection", "Config"))
    model = cls(config_cls(backbone_config=config, num_labels=7, **changes))
    return randomise(model, seed=1).eval().double()


def tiny(**changes: Any) -> nn.Module:
    return theirs(**{"encoder_in_channels": [16, 32, 64], "encoder_hidden_dim": 32, "d_model": 32, "num_queries": 10,
                     "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_in_channels": [32, 32, 32],
                     "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 3,
                     "num_denoising": 5, **changes})


def as_older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files on the hub have it: older names, and the heads a second time."""
    found = {}
    for name, tensor in state.items():
        old = name.replace("encoder.aifi.", "encoder.encoder.").replace(".o_proj.", ".out_proj.")
        old = re.sub(r"\.mlp\.fc(\d)", r".fc\1", old)
        found[old] = tensor
        if match := re.match(r"model\.decoder\.((class|bbox)_embed\..*)", name):
            found[match[1]] = tensor
    return found


def images(h: int = 64, w: int = 64, n: int = 2) -> Tensor:
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def agree(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Each an object with logits and boxes, or a dict of ours."""
    for ours, name in (("pred_logits", "logits"), ("pred_boxes", "pred_boxes")):
        a, b = (one[ours] if ours in one else getattr(one, name) for one in (found, expected))
        assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", few(SIZES, lambda name: name == "rtdetr_r18vd"))
def test_files(name: str, older: bool) -> None:
    layer_type, backbone, changes = SIZES[name]
    model = theirs(layer_type, backbone, **changes)
    net = adn.create_model(name, num_classes=7).double().eval()
    state = model.state_dict()
    report = adn.load_weights(net, as_older(state) if older else state)
    assert report.complete
    assert report.naming == "transformers"
    x = images(320, 320, 1)
    with torch.no_grad():
        agree(net(x), model(x))


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_objects_at_every_depth(layer_type: str) -> None:
    """Bit-identical at full depth; at every depth what our own any-depth net computes."""
    model = tiny(layer_type=layer_type) if layer_type == "basic" else tiny(
        layer_type=layer_type, backbone=NARROW_BOTTLENECKS, encoder_in_channels=[64, 128, 256])
    x = images()
    with torch.no_grad():
        before = model(x)
    net = adn.convert(model)
    with torch.no_grad():
        agree(net(x), before, 1e-30)
    randomise_second_sets(net)
    own = interface_of(net).deploy().model
    seen = []
    every = adn.depths(net)
    assert len(every) == 32 * 3
    for depth in every:
        adn.set_depth(net, depth)
        adn.set_depth(own, depth)
        with torch.no_grad():
            outputs = net(x)
            agree(own(x), outputs)
            agree(adn.extract(net, depth)(x), outputs, 1e-30)
        seen.append(outputs.logits)
    assert len({tuple(logits.flatten()[:20].tolist()) for logits in seen}) == len(seen)


def randomise_second_sets(net: nn.Module) -> None:
    for module in net.modules():
        if "skip" in module._modules:
            randomise(module._modules["skip"], seed=3)


@pytest.mark.parametrize("size", [(64, 64), (64, 160)])
def test_deploy_form_and_engine(size: tuple[int, int]) -> None:
    """Places of tokens of images that are not square are told as transformers does."""
    net = adn.convert(tiny())
    randomise_second_sets(net)
    x = images(*size)
    adn.set_depth(net, "TFTFT|2")
    fused = adn.fuse(net)
    assert adn.get_depth(fused) == adn.get_depth(net)
    engine = adn.Engine(fused)
    for depth in ("super", "FTFFT|1", "base"):
        adn.set_depth(net, depth)
        adn.set_depth(fused, depth)
        with torch.no_grad():
            expected = net(x)
        assert type(fused(x)) is type(expected)
        agree(fused(x), expected)
        agree(engine(x, depth), expected)
        agree(fused.per_image(x, [depth, depth]), expected)
    assert is_detector(fused)


def test_no_recompiles_in_a_second_sweep() -> None:
    net = adn.compile(adn.convert(tiny()), backend="aot_eager", dynamic=False)
    every = adn.depths(net)[::7]
    x = images()
    with torch.no_grad():
        expected = []
        for depth in every:
            adn.set_depth(net, depth)
            expected.append(net(x))
        for stance in ("fail_on_recompile", "force_eager"):
            with set_stance(stance):
                for depth, one in zip(every, expected, strict=True):
                    adn.set_depth(net, depth)
                    agree(net(x), one)


def test_objects_found() -> None:
    """Our postprocessing finds what theirs does, and the task takes the net."""
    net = adn.convert(tiny())
    adn.set_depth(net, "base")
    x = images()
    with torch.no_grad():
        outputs = net(x)
    processor = transformers.RTDetrImageProcessor()
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(200, 300), (64, 64)])
    found = DETECT.postprocess(net, outputs, [(300, 200), (64, 64)])
    assert task_of(net) is DETECT
    assert interface_of(net).num_classes == 7
    for ours, other in zip(found, expected, strict=True):
        assert len(ours["scores"]) == 70  # of all pairs of a query and a class
        best = ours["scores"].topk(len(other["scores"])).values
        torch.testing.assert_close(best, other["scores"].sort(descending=True).values.double(), rtol=1e-6, atol=1e-6)


def test_other_kinds() -> None:
    """RT-DETRv2 has the same structure; there is no deploy form of it."""
    model = tiny(kind="RTDetrV2")
    x = images()
    with torch.no_grad():
        before = model(x)
    net = adn.convert(copy.deepcopy(model))
    assert isinstance(adn.plan(model).stacks[0], StackPlan)
    with torch.no_grad():
        agree(net(x), before, 1e-30)
        adn.set_depth(net, "base")
        assert (net(x).logits - before.logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no deploy form of a RTDetrV2ForObjectDetection"):
        adn.fuse(net)


def test_dfine() -> None:
    """An HGNet and CSP blocks inside of others: flags of the backbone and of the neck; its decoder runs whole."""
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 32, 64], stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 64, 128], stage_num_blocks=[1, 1, 3, 2], stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 128], embedding_size=8, out_features=["stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    model = randomise(transformers.DFineForObjectDetection(transformers.DFineConfig(
        backbone_config=backbone, num_labels=7, encoder_in_channels=[32, 64, 128], encoder_hidden_dim=32, d_model=32,
        num_queries=10, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_in_channels=[32] * 3, num_denoising=5,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3)), seed=1).eval().double()
    x = images()
    with torch.no_grad():
        before = model(x)
    net = adn.convert(model)
    randomise_second_sets(net)
    assert [len(stage.refinement_blocks) for stage in state_of(net).plan if stage.has_flag] == [1, 1, *[2] * 8]
    seen = []
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        with torch.no_grad():
            outputs = net(x)
            agree(adn.extract(net, depth)(x), outputs, 1e-30)
        seen.append(outputs.logits)
    assert torch.equal(seen[0], before.logits)
    assert len({tuple(logits.flatten()[:20].tolist()) for logits in seen}) == 8
    assert task_of(net) is DETECT
    with pytest.raises(ValueError, match="no deploy form of a DFineForObjectDetection"):
        adn.fuse(net)


def test_backbone_of_another_kind() -> None:
    model = tiny()
    model.model.backbone.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ConversionError, match=r"no stages to bypass found in the backbone .* not those of a ResNet or"):
        adn.convert(model)


def test_nothing_fits() -> None:
    net = adn.create_model("rtdetr_r18vd", num_classes=7)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match=r"nothing in the state dict fits this RTDETR: it has 2 entries"):
        adn.load_weights(net, nn.Linear(3, 4).state_dict(), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
