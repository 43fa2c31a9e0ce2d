"""Other people's checkpoints, into each other's models."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import build, few, randomise
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import adn
from adn.weights.checkpoint import save
from adn.weights.foreign import LoadReport, load_weights

# fixture: (torchvision, timm, float32 deviation stated by the specification)
REFERENCE = {
    "resnet50_adn": ("resnet50", "resnet50", 4e-7),
    "mobilenetv2_adn": ("mobilenet_v2", "mobilenetv2_100", 1.2e-4),
    "vit_b16_adn": ("vit_b_16", "vit_base_patch16_224", 2.6e-6),
    "swin_t_adn": ("swin_t", "swin_tiny_patch4_window7_224", 1.3e-6),
}

# Small models of the same two libraries; the input's size.
PAIRS = {
    "ResNet": (lambda: torchvision.models.resnet18(num_classes=5),
               lambda: timm.create_model("resnet18", num_classes=5), 33),
    "MobileNetV2": (lambda: torchvision.models.mobilenet_v2(num_classes=5),
                    lambda: timm.create_model("mobilenetv2_100", num_classes=5), 65),
    "ViT": (lambda: VisionTransformer(32, 8, 7, 2, 24, 48, num_classes=5),
            lambda: TimmViT(32, 8, embed_dim=24, depth=7, num_heads=2, mlp_ratio=2, num_classes=5), 32),
    "Swin": (lambda: SwinTransformer([4, 4], 12, [2, 3, 2], [1, 2, 4], [4, 4], num_classes=5),
             lambda: TimmSwin(64, embed_dim=12, depths=(2, 3, 2), num_heads=(1, 2, 4), window_size=4,
                              num_classes=5), 64),
    "ConvNeXt": (lambda: ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 3), CNBlockConfig(24, 32, 2),
                                   CNBlockConfig(32, None, 2)], num_classes=5),
                 lambda: timm.models.ConvNeXt(depths=(2, 3, 2, 2), dims=(8, 16, 24, 32), num_classes=5), 64),
    "RegNet": (lambda: torchvision.models.regnet_y_400mf(num_classes=5),
               lambda: timm.create_model("regnety_004", num_classes=5), 65),
    "EfficientNet": (lambda: torchvision.models.efficientnet_b0(num_classes=5),
                     lambda: timm.create_model("efficientnet_b0", num_classes=5), 65),
}


def shaken(net: nn.Module, seed: int = 3) -> nn.Module:
    """Random norms and statistics, twins different from the norms they belong to.

    Kernels are drawn by fan-in: torchvision's initialisation by fan-out loses the signal of depthwise nets whose
    statistics do not fit.
    """
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return randomise(net, seed).eval()


def chain(net: nn.Module) -> list[adn.Depth]:
    """The two extremes and two mixed depths."""
    n = len(adn.get_depth(net))
    return [adn.Depth(flags) for flags in ([False] * n, [True] * n, [i % 2 == 0 for i in range(n)],
                                           [i == n - 1 for i in range(n)])]


@torch.inference_mode()
def run(net: nn.Module, x: torch.Tensor, depth: adn.Depth) -> torch.Tensor:
    with adn.at_depth(net, depth):
        return net.eval()(x)


def assert_same_function(a: nn.Module, b: nn.Module, size: int, atol: float = 1e-5) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    results = [run(a, x, depth) for depth in chain(a)]
    for depth, result in zip(chain(a), results, strict=True):
        bound = atol * result.abs().max().item()
        torch.testing.assert_close(run(b, x, depth), result, rtol=0, atol=bound, msg=lambda m, d=depth: f"{d}: {m}")
        for other in results:
            assert other is result or (other - result).abs().max() > 100 * bound, "depths alike: nothing is tested"


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("name", few(REFERENCE, lambda name: "vit" not in name))
def test_reference_into_both_libraries(name: str, golden, seeded) -> None:
    manifest, arrays = golden(name)
    state = seeded.reference_state(manifest)
    in_torchvision, in_timm, deviation = REFERENCE[name]
    nets = {"torchvision": adn.convert(torchvision.models.get_model(in_torchvision), twins="fresh"),
            "timm": adn.convert(timm.create_model(in_timm), twins="fresh")}
    for net in nets.values():
        report = load_weights(net, state)
        assert report.complete
        assert report.naming.startswith("reference")
        assert len(report.loaded) == len(state)
        assert not report.filled
    assert_same_function(*nets.values(), size=224)
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"])
    # timm's Swin is built for one size and adapts its windows to it, unlike the reference.
    for library in ["torchvision"] if name == "swin_t_adn" else nets:
        for depth in chain(nets[library]):
            expected = torch.from_numpy(arrays["logits"][manifest["config_labels"].index(str(depth))])
            torch.testing.assert_close(run(nets[library], x, depth), expected, rtol=0, atol=10 * deviation)


def reference_names(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".skip.", "_skip."): tensor.clone() for name, tensor in net.state_dict().items()}


def test_reference_vd_into_timm() -> None:
    """The reference's `vd`: pooled shortcuts in the strided stages, with no identity in the first."""
    net = shaken(adn.convert(timm.create_model("resnet50", avg_down=True, num_classes=5)))
    state = {}
    for name, tensor in reference_names(net).items():
        if name.startswith("layer1.0."):
            name = name.replace("downsample.1", "downsample.0").replace("downsample.2", "downsample.1")
        state[name] = tensor
    assert state["layer1.0.downsample.0.weight"].ndim == state["layer2.0.downsample.1.weight"].ndim == 4
    into = adn.convert(timm.create_model("resnet50", avg_down=True, num_classes=5))
    report = load_weights(into, state)
    assert report.complete
    assert report.naming == "reference ResNet vd"
    assert_same_function(net, into, size=33)
    for wrong in (timm.create_model("resnet50", num_classes=5), torchvision.models.resnet50(num_classes=5)):
        with pytest.raises(adn.CheckpointError, match="downsample"):
            load_weights(adn.convert(wrong), state)


@pytest.mark.full
def test_reference_resnet101() -> None:
    net = shaken(adn.convert(torchvision.models.resnet101(num_classes=2)))
    state = reference_names(net)
    assert sum("_skip" in name for name in state) == 270
    into = adn.convert(timm.create_model("resnet101", num_classes=2))
    load_weights(into, state)
    assert all(torch.equal(tensor, into.state_dict()[name]) for name, tensor in net.state_dict().items())


# ------------------------------------------------------------------------------------------------ torchvision and timm


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("direction", ["torchvision to timm", "timm to torchvision"])
def test_between_libraries(family: str, direction: str) -> None:
    torch.manual_seed(0)
    *makers, size = PAIRS[family]
    make_source, make_target = makers if direction.startswith("torchvision") else reversed(makers)
    source, target = shaken(make_source()), make_target().eval()
    plain = source.state_dict()
    report = load_weights(target, plain)  # neither is converted
    assert report.complete
    assert report.naming == ("plain names" if family == "ResNet" else f"{direction.split()[0]} {family}")
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)

    adn.convert(source)
    net = adn.convert(make_target())
    report = load_weights(net, plain)  # plain weights: the twins are filled
    assert report.filled
    assert all(".skip." in name for name in report.filled)
    assert_same_function(source, net, size)

    shaken(source)  # any-depth weights: the twins are carried over
    report = load_weights(net, source.state_dict())
    assert not report.filled
    assert_same_function(source, net, size)


def test_fresh_twins() -> None:
    model = build("resnet18", num_classes=5)
    plain = model.state_dict()
    net = shaken(adn.convert(timm.create_model("resnet18", num_classes=5), twins="fresh"))
    report = load_weights(net, plain)
    assert report.filled
    twin, norm = net.layer1[0].bn1.skip, net.layer1[0].bn1
    assert torch.equal(norm.running_var, plain["layer1.0.bn1.running_var"])
    assert torch.equal(twin.running_var, torch.ones(64))
    assert torch.equal(twin.weight, torch.ones(64))
    assert not twin.running_mean.any()
    assert not twin.bias.any()


def test_fp16_weights_into_a_float32_net() -> None:
    model = build("resnet18", num_classes=5).half()
    net = adn.convert(timm.create_model("resnet18", num_classes=5))
    load_weights(net, model.state_dict())
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, model.fc.weight.float())


# ------------------------------------------------------------------------------------------------------ how it is held


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return build("resnet18", num_classes=5)


def fresh(**kwargs: object) -> nn.Module:
    return adn.convert(timm.create_model("resnet18", **{"num_classes": 5, **kwargs}))


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def unchanged(net: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def average(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As torch.optim.swa_utils.AveragedModel stores it."""
    return {"n_averaged": torch.tensor(5), **{f"module.{name}": tensor for name, tensor in state.items()}}


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


CONTAINERS = {
    "bare": lambda s: s,
    "torchvision script": lambda s: {"model": zeros(s), "optimizer": {"state": {}}, "epoch": 3,
                                     "args": argparse.Namespace(lr=1), "model_ema": average(s)},
    "timm script": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "epoch": 1},
    "RT-DETR script": lambda s: {"model": zeros(s), "ema": {"module": s, "updates": 7}, "last_epoch": 3},
    "no average": lambda s: {"model": s, "ema": None, "model_ema": None},
    "average only": lambda s: {"model_ema": average(s)},
    "nested": lambda s: {"ema": {"module": s, "updates": 7}},
    "DDP": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled in DDP": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "compiled block": lambda s: {k.replace("layer1.0.", "layer1.0._orig_mod."): v for k, v in s.items()},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("held", ["in memory", "new format", "old format"])
def test_containers(container: str, held: str, source: nn.Module, tmp_path: Path) -> None:
    content: object = CONTAINERS[container](source.state_dict())
    if held != "in memory":
        torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=held == "new format")
        content = tmp_path / "a.pth.tar"
    net = fresh()
    report = load_weights(net, content)
    assert report.complete
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in source.state_dict().items())
    assert torch.equal(net.layer1[0].bn1.skip.weight, source.layer1[0].bn1.weight)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_safetensors_whatever_the_name(name: str, source: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(source.state_dict(), tmp_path / name)
    net = fresh()
    load_weights(net, str(tmp_path / name))
    assert torch.equal(net.fc.weight, source.fc.weight)


def test_own_file_and_wrapped_net(source: nn.Module, tmp_path: Path) -> None:
    any_depth = shaken(fresh())
    save(any_depth, tmp_path / "net.safetensors")
    wrapper = nn.Module()
    wrapper.module = fresh()  # what DistributedDataParallel looks like
    report = load_weights(wrapper, tmp_path / "net.safetensors")
    assert report.naming == "adn"
    assert unchanged(wrapper.module, any_depth.state_dict())


def test_counters_and_tables_may_be_absent() -> None:
    source, into = PAIRS["Swin"][0](), adn.convert(PAIRS["Swin"][0]())
    state = {k: v for k, v in source.state_dict().items() if "relative_position_index" not in k}
    table = into.features[1][0].attn.relative_position_index.clone()
    assert load_weights(into, state).complete
    # Index tables of another shape or content are not read either.
    state["features.1.0.attn.relative_position_index"] = torch.zeros(3, dtype=torch.int64)
    assert load_weights(into, state).ignored == ["features.1.0.attn.relative_position_index"]
    assert torch.equal(into.features[1][0].attn.relative_position_index, table)

    net = fresh()
    net.bn1.num_batches_tracked.fill_(9)
    state = {k: v for k, v in build("resnet18", num_classes=5).state_dict().items() if "num_batches" not in k}
    assert load_weights(net, state).complete
    assert net.bn1.num_batches_tracked == 9


# ---------------------------------------------------------------------------------------------------------- mismatches


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    state = dict(state)
    if how == "missing":
        del state["layer2.0.conv1.weight"]
    elif how == "left over":
        state["layer9.conv.weight"] = torch.ones(1)
    elif how == "shape":
        state["fc.bias"] = torch.ones(6)
    elif how == "some twins":
        state["layer1.0.bn1.skip.weight"] = torch.ones(64)
    elif how == "foreign":
        state = torchvision.models.squeezenet1_1().state_dict()
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "1 missing: layer2.0.conv1.weight"),
        ("left over", "1 left over: layer9.conv.weight"),
        ("shape", r"1 of other shape: fc.bias: \(6,\) given, \(5,\) in the net\nstrict=False"),
        ("some twins", r"missing: layer1.0.bn1.skip.bias, .*, \.\.\."),
        ("foreign", r"nothing in the state dict fits this ResNet: it has 52 entries, such as features\.0\.weight"),
    ],
)
def test_mismatches(how: str, message: str, source: nn.Module) -> None:
    net = fresh()
    before, state = snapshot(net), broken(source.state_dict(), how)
    with pytest.raises(adn.CheckpointError, match=message):
        load_weights(net, state)
    assert unchanged(net, before)
    if how == "foreign":  # a random net must not be left without a word
        with pytest.raises(adn.CheckpointError, match=message):
            load_weights(net, state, strict=False)
        assert unchanged(net, before)
        return
    report = load_weights(net, state, strict=False)
    assert not report.complete
    loaded = net.state_dict()
    assert unchanged(net, {**before, **{name: loaded[name] for name in report.loaded + report.filled}})
    if how == "some twins":
        assert not report.filled
        assert torch.equal(net.layer1[0].bn1.skip.weight, torch.ones(64))
    else:
        assert torch.equal(net.conv1.weight, source.conv1.weight)
        assert torch.equal(net.layer1[0].bn1.skip.running_mean, source.layer1[0].bn1.running_mean)


def test_twins_into_a_plain_model() -> None:
    model, state = timm.create_model("resnet18", num_classes=5), reference_names(fresh())
    before = snapshot(model)
    with pytest.raises(adn.CheckpointError, match="convert the model first"):
        load_weights(model, state)
    assert unchanged(model, before)


def test_shapes_are_only_bent_between_libraries() -> None:
    """(C, 1, 1) and (C,) are the same layer scale in two libraries, but a mismatch within one."""
    model = PAIRS["ConvNeXt"][1]()
    state = {k: v[:, None, None] if k.endswith("gamma") else v for k, v in model.state_dict().items()}
    with pytest.raises(adn.CheckpointError, match="of other shape"):
        load_weights(model, state)


def test_report_prints_well() -> None:
    report = LoadReport("reference ViT", ["a"] * 184, [], ["b.c", "d"], [f"m{i}" for i in range(9)], ["e: (1,) given"])
    assert str(report).splitlines() == [
        "reference ViT: 184 loaded, 0 of twins filled",
        "1 of other shape: e: (1,) given",
        "9 missing: m0, m1, m2, m3, m4, ...",
        "2 left over: b.c, d",
    ]
    assert str(LoadReport("adn", ["a"], ["b", "c"], ignored=["t"])) == "adn: 1 loaded, 2 of twins filled, 1 not needed"


# ----------------------------------------------------------------------------------------------------------- bad files


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["new format", "old format", "plain pickle"])
def test_pickled_code_is_not_run(how: str, tmp_path: Path) -> None:
    path, net = tmp_path / "a.pth", fresh()
    content = {"model": {"conv1.weight": torch.ones(1)}, "extra": Code(tmp_path / "trace")}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "new format")
    before = snapshot(net)
    with pytest.raises(adn.CheckpointError, match=r"pickled code \(\w+.mkdir\), which is not run"):
        load_weights(net, path)
    assert not (tmp_path / "trace").exists()
    assert unchanged(net, before)


def test_a_pickled_module_is_refused(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source, tmp_path / "a.pth")
    with pytest.raises(adn.CheckpointError, match=r"pickled code \(timm.models.resnet.ResNet\)"):
        load_weights(fresh(), tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["new format", "old format", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated(kind: str, share: float, source: nn.Module, tmp_path: Path) -> None:
    path, net = tmp_path / "a.pth", fresh()
    if kind == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "new format")
    os.truncate(path, int(share * path.stat().st_size))
    before = snapshot(net)
    with pytest.raises(adn.CheckpointError, match="is empty" if not share else "damaged"):
        load_weights(net, path)
    assert unchanged(net, before)


def test_other_files(source: nn.Module, tmp_path: Path) -> None:
    net, path = fresh(), tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match=r"a.pth"):
        load_weights(net, path)
    with pytest.raises(adn.CheckpointError, match="folder"):
        load_weights(net, tmp_path)
    path.write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    with pytest.raises(adn.CheckpointError, match="begins with b'<!DOCTYPE html>"):
        load_weights(net, path)
    torch.save([1, 2], path)
    with pytest.raises(adn.CheckpointError, match="holds list, not a state dict"):
        load_weights(net, path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(adn.CheckpointError, match="holds no weights; its keys are epoch"):
        load_weights(net, path)
    with pytest.raises(adn.CheckpointError, match="the state dict holds no weights; its keys are none"):
        load_weights(net, {})
