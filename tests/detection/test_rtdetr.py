"""RT-DETR and AnyDepth-DETR: the reference's numbers, what converts, what is refused."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import timm
import torch
from conftest import few, randomise
from detr_cases import Golden
from torch import nn
from torch.utils.checkpoint import checkpoint

import adn
from adn.core.behaviours import TWINS
from adn.core.state import state_of
from adn.measure.cost import count_macs
from adn.models.registry import ENTRIES
from adn.models.rtdetr.criterion import DetectionLoss, DistillationLoss
from adn.models.rtdetr.denoising import Draws
from adn.models.rtdetr.encoder import CSPRepLayer, HybridEncoder, PositionTable
from adn.models.rtdetr.model import RTDETR
from adn.runtime.fuse import fuse
from adn.runtime.layers import RepConvNormAct

TINY = {"hidden": 32, "decoder_hidden": 32, "heads": 4, "feedforward": 48, "decoder_feedforward": 48, "queries": 20,
        "num_classes": 5, "num_denoising": 8, "points": 2}
PARAMETERS = {"rtdetr_r18vd": 20_184_464, "rtdetr_r50vd": 42_891_372, "rtdetr_r101vd": 76_556_268,
              "anydepth_rtdetr_r50vd": 42_885_068, "anydepth_rtdetr_r101vd": 76_556_364}


def tiny(name: str = "rtdetr_r18vd", twins: str | None = None, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("rtdetr"):
        kwargs["backbone_args"] = {"width": 8}
    model = randomise(adn.create_model(name, twins=twins, **TINY, **kwargs)).eval()
    with torch.no_grad():
        for head in (model.decoder.enc_bbox_head, *model.decoder.dec_bbox_head):
            head.layers[-1].weight.normal_(0, 0.3)
        for layer in model.decoder.decoder.layers:
            layer.cross_attn.sampling_offsets.weight.normal_(0, 0.1)
            layer.cross_attn.attention_weights.weight.normal_(0, 0.3)
    return model


def in_order(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries by their token: which of two with nearly the same score comes first is a matter of rounding."""
    order = outputs["query_index"].argsort(1)
    return {name: torch.stack([rows[i] for rows, i in zip(value, order)]) for name, value in outputs.items()}


# ------------------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("name", ["rtdetr_r18vd", "rtdetr_r50vd", "anydepth_rtdetr_r50vd"])
def test_every_configuration_of_the_reference(name: str, golden, seeded) -> None:
    manifest, arrays = golden(name)
    net = adn.create_model(name).eval()
    assert adn.load_weights(net, seeded.reference_state(manifest)).complete
    assert len(net.state_dict()) == len(manifest["state"])
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"])
    tolerance = manifest["tolerance"]
    for config in manifest["configs"]:
        if config != "full":
            adn.set_depth(net, config)
        with torch.inference_mode():
            features = net.backbone(x)
            maps = net.encoder(features)
            outputs = in_order(net(x))
        every = manifest["feature_step"]
        for what, kind in ((features, "backbone"), (maps, "encoder")):
            for i, feature in enumerate(what):
                np.testing.assert_allclose(feature.flatten()[::every], arrays[f"{config}/{kind}_{i}"], **tolerance,
                                           err_msg=f"{config} {kind} {i}")
        np.testing.assert_array_equal(outputs["query_index"], arrays[f"{config}/tokens"], err_msg=config)
        np.testing.assert_allclose(outputs["pred_boxes"], arrays[f"{config}/boxes"], **tolerance, err_msg=config)
        np.testing.assert_allclose(outputs["pred_logits"].flatten()[:: manifest["logits_step"]],
                                   arrays[f"{config}/logits"], **tolerance, err_msg=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neck_on_maps_that_are_not_square(dtype: torch.dtype, golden, seeded) -> None:
    manifest, arrays = golden("anydepth_hybrid_encoder")
    net = adn.convert(HybridEncoder([16, 24, 32], 32, 4, 48)).eval()
    adn.load_weights(net, seeded.reference_state(manifest))
    net.to(dtype)
    maps = [seeded.seeded_input(manifest["inputs"][f"c{i}"], manifest["seed"]).to(dtype) for i in range(3)]
    for depth in manifest["configs"]:
        with torch.inference_mode(), adn.at_depth(net, depth):
            for i, out in enumerate(net(maps)):
                np.testing.assert_allclose(out, arrays[f"{depth}/p{i}"], **manifest["tolerance"])


def reference_csp(golden, seeded) -> tuple[nn.Module, dict, dict]:
    manifest, arrays = golden("anydepth_csprep")
    net = adn.convert(CSPRepLayer(24, 16, 3, 1.0))
    adn.load_weights(net, seeded.reference_state(manifest))
    return net, manifest, arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_csp_block_learns_as_in_the_reference(dtype: torch.dtype, golden, seeded) -> None:
    net, manifest, arrays = reference_csp(golden, seeded)
    net.to(dtype)
    x, grad_out = (seeded.seeded_input(manifest["inputs"][name], manifest["seed"]).to(dtype)
                   for name in ("x", "grad_out"))
    tolerance = manifest["tolerance"]
    for depth in manifest["configs"]:
        block = copy.deepcopy(net)
        adn.set_depth(block, depth)
        with torch.inference_mode():
            np.testing.assert_allclose(block.eval()(x), arrays[f"eval/{depth}"], **tolerance)
        before = {name: buffer.clone() for name, buffer in block.named_buffers()}
        leaf = x.clone().requires_grad_()
        out = block.train()(leaf)
        (out * grad_out).sum().backward()
        np.testing.assert_allclose(out.detach(), arrays[f"train/{depth}/out"], **tolerance)
        np.testing.assert_allclose(leaf.grad, arrays[f"train/{depth}/grad_x"], **tolerance)

        def known(kind: str, depth: str = depth) -> dict[str, np.ndarray]:
            start = f"train/{depth}/{kind}/"
            return {key.removeprefix(start).replace("norm_skippable", "norm.skip"): value
                    for key, value in arrays.items() if key.startswith(start)}

        norms = {name: p.grad.norm() for name, p in block.named_parameters() if p.grad is not None}
        assert norms.keys() == known("gradnorm").keys()
        for name, value in known("gradnorm").items():
            np.testing.assert_allclose(norms[name], value, **tolerance, err_msg=name)
        changed = {name: buffer for name, buffer in block.named_buffers()
                   if buffer.is_floating_point() and not torch.equal(buffer, before[name])}
        assert changed.keys() == known("buffer").keys()
        for name, value in known("buffer").items():
            np.testing.assert_allclose(changed[name], value, **tolerance, err_msg=name)


def test_deploy_form_of_a_csp_block_is_right_at_both_depths(golden, seeded) -> None:
    """At full depth as the reference's; bypassed as before folding, where the reference's is not."""
    net, manifest, arrays = reference_csp(golden, seeded)
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"])
    fused = fuse(net.eval())
    for depth, expected in (("F", "deploy_reference/F"), ("T", "eval/T")):
        with torch.inference_mode(), adn.at_depth(fused, depth):
            np.testing.assert_allclose(fused(x), arrays[expected], **manifest["tolerance"])
    assert np.abs(arrays["deploy_reference/T"] - arrays["eval/T"]).max() > 0.5
    merged = [m for path in fused.segments[0].paths for m in path.modules() if isinstance(m, RepConvNormAct)]
    assert [len([m for m in path.modules() if isinstance(m, RepConvNormAct)]) for path in fused.segments[0].paths] == [
        3, 1]
    for i, layer in enumerate(merged[:3]):
        np.testing.assert_allclose(layer.weight, arrays[f"deploy_kernel/{i}/weight"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.bias, arrays[f"deploy_kernel/{i}/bias"], rtol=1e-4, atol=1e-5)


def our_name(name: str) -> str:
    """Of what the reference calls otherwise."""
    name = re.sub(r"_skip(pable)?\.", ".skip.", name)
    name = re.sub(r"(backbone\.layer1\.0\.downsample)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) + 1}", name)
    return re.sub(r"(encoder\.input_proj\.\d)\.(conv|norm)",
                  lambda m: f"{m[1]}.{('conv', 'norm').index(m[2])}", name) if name.startswith("encoder") else name


def test_whole_training_step(golden, seeded) -> None:
    """Every loss term, gradient norm and statistic of a step of self-distillation; the reference ran in float64."""
    manifest, arrays = golden("anydepth_rtdetr_r50vd_step")
    tolerance = manifest["tolerance"]
    net = adn.create_model("anydepth_rtdetr_r50vd", queries=60, num_denoising=12)
    adn.load_weights(net, seeded.reference_state(manifest))
    net.double().train()
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"]).double()
    targets = Golden(seeded, manifest["seed"]).targets(manifest["targets_per_image"])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    teacher = None
    for which in ("super", "base"):
        draws = Draws(*(torch.from_numpy(arrays[f"draws/{which}/{name}"])
                        for name in ("u_label", "new_label", "sign01", "u_box")))
        with adn.at_depth(net, which):
            outputs = net(x, targets, draws)
        terms = DetectionLoss()(outputs, targets) if teacher is None else DistillationLoss()(outputs, targets, teacher)
        names = manifest["loss_names"][which]
        assert terms.keys() == set(names)
        np.testing.assert_allclose([terms[name].item() for name in names], arrays[f"{which}/losses"],
                                   rtol=tolerance["losses_rtol"])
        total = sum(terms.values())
        np.testing.assert_allclose(total.item(), arrays[f"{which}/total"], rtol=tolerance["losses_rtol"])
        total.backward()
        teacher = outputs
        got = {name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None}
        names = [our_name(name) for name in manifest["gradnorm_names"][which]]
        assert got.keys() == set(names)
        np.testing.assert_allclose([got[name] for name in names], arrays[f"{which}/gradnorms"],
                                   rtol=tolerance["gradnorm_rtol"], atol=tolerance["gradnorm_atol"])
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    np.testing.assert_allclose(norm.item(), arrays["clip_total_norm"], rtol=tolerance["gradnorm_rtol"])
    changed = {name for name, buffer in net.named_buffers()
               if buffer.is_floating_point() and not torch.equal(buffer, before[name])}
    names = [our_name(name) for name in manifest["buffer_names"]]
    assert changed == set(names)
    buffers = dict(net.named_buffers())
    np.testing.assert_allclose([buffers[name][:8].numpy() for name in names], arrays["buffers"], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- models by name


@pytest.mark.parametrize("name", ENTRIES)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        net = adn.create_model(name)
    assert name in adn.list_models()
    count = sum(p.numel() for p in net.parameters())
    assert name not in PARAMETERS or count == PARAMETERS[name]
    assert ("_adn" in vars(net)) == ENTRIES[name].any_depth


GMACS = {
    "rtdetr_r18vd": {"FFFF|F|3": 30.865},
    "rtdetr_r50vd": {"FFFF|F|6": 68.984},
    "rtdetr_r101vd": {"FFFF|F|6": 130.405},
    "anydepth_rtdetr_r50vd": {"FFFF|F|6": 67.028, "TTTT|T|4": 39.505, "TTTT|T|6": 41.423, "TFFF|F|6": 67.028 - 1.783,
                              "FTFF|F|6": 67.028 - 3.565, "FFTF|F|6": 67.028 - 5.348, "FFFF|T|6": 67.028 - 13.128,
                              "FFFF|F|5": 67.028 - 0.959},
    "anydepth_rtdetr_r101vd": {"FFFF|F|6": 128.449, "TTTT|T|4": 70.271, "FFTF|F|6": 128.449 - 19.608},
}


@pytest.mark.parametrize("name", few(GMACS, ["rtdetr_r18vd"].__contains__))
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    net = adn.create_model(name).eval()
    if not name.startswith("anydepth"):
        adn.convert(net)
    counts = count_macs(net, torch.zeros(1, 3, 640, 640), GMACS[name], norms=True)
    np.testing.assert_allclose([count / 1e9 for count in counts], list(GMACS[name].values()), rtol=1e-4)


@pytest.mark.parametrize("twins", TWINS)
@pytest.mark.parametrize("name", ["rtdetr_r18vd", "rtdetr_r34vd", "rtdetr_r50vd_m", "rtdetr_r50vd"])
def test_static_models_convert(name: str, twins: str) -> None:
    model = tiny(name)
    x = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        expected = model(x)
        net = adn.convert(model, twins=twins)
        full = net(x)
    assert all(torch.equal(full[key], expected[key]) for key in expected)
    layers = len(model.decoder.decoder.layers)
    assert adn.depths(net)[0] == adn.Depth(f"FFFF|F|{layers}")
    assert state_of(net).base == adn.Depth(f"TTTT|T|{[0, 1, 2, 2, 3, 4, 4][layers]}")
    frozen = name.startswith("rtdetr_r50")
    twin = net.get_submodule("backbone.res_layers.0.blocks.0.branch2a.norm.skip")
    assert isinstance(twin, nn.BatchNorm2d) == (not frozen or twins != "frozen")
    assert state_of(net).plan.flags[4][0].norms[:2] == ["encoder.input_proj.0.1", "encoder.input_proj.1.1"]


def test_every_depth_computes_something_else() -> None:
    net = tiny("anydepth_rtdetr_r50vd", backbone="resnet18", decoder_layers=2)
    randomise(net, seed=1)
    x = torch.rand(1, 3, 64, 96)
    seen = set()
    with torch.inference_mode():
        for i, depth in enumerate(adn.depths(net)):
            adn.set_depth(net, depth)
            outputs = net(x)
            assert outputs["pred_logits"].shape == (1, 20, 5)
            assert outputs["query_index"].unique().numel() == 20
            if i % 5 == 0:  # all numbers of layers, and both values of every flag
                static = adn.extract(net, depth).eval()
                assert len(static.decoder.decoder.layers) == len(static.decoder.dec_score_head) == depth[-1]
                # Not bit for bit: where a copy lies in memory, torch 2.11 rounds products of attention otherwise.
                torch.testing.assert_close(static(x), outputs)
            seen.add(outputs["pred_boxes"].sum().item())
    assert len(seen) == len(adn.depths(net)) == 64


def test_decoder_depth_in_training_is_an_option() -> None:
    net = tiny().train()
    adn.convert(net)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}]
    x = torch.rand(1, 3, 64, 64)
    adn.set_depth(net, "FFFF|F|2")
    assert len(net(x, targets)["aux_outputs"]) == 3  # two layers before the last, and the encoder
    state_of(net).cuts[0].in_training = True
    outputs = net(x, targets)
    assert len(outputs["aux_outputs"]) == len(outputs["dn_aux_outputs"]) == 2


def test_a_checkpointed_decoder_is_recomputed_at_the_depth_of_its_forward() -> None:
    gradients = []
    for checkpointed in (False, True):
        net = adn.convert(tiny()).train()
        for cut in state_of(net).cuts:
            cut.in_training = True
        maps = [torch.randn(1, 32, side, side, generator=torch.Generator().manual_seed(side), requires_grad=True)
                for side in (8, 4, 2)]
        loss = 0
        for depth in ("super", "base"):
            with adn.at_depth(net, depth):
                outputs = checkpoint(net.decoder, maps, use_reentrant=False) if checkpointed else net.decoder(maps)
            assert len(outputs["aux_outputs"]) == (3 if depth == "super" else 2)
            loss = loss + outputs["pred_logits"].square().sum() + outputs["pred_boxes"].sum()
        loss.backward()
        gradients.append([*(x.grad for x in maps), *(p.grad for p in net.decoder.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_saved_and_loaded(tmp_path) -> None:
    for net in (adn.convert(tiny()), tiny("anydepth_rtdetr_r50vd", backbone="resnet18"),
                tiny("anydepth_rtdetr_r50vd", twins="copy", backbone="resnet18")):
        adn.set_depth(net, "base")
        adn.save(net, tmp_path / "net.safetensors")
        again = adn.load(tmp_path / "net.safetensors").eval()
        x = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            expected, got = net(x), again(x)
        assert adn.get_depth(again) == adn.get_depth(net)
        assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_learning_reaches_every_parameter() -> None:
    """Of a converted detector with frozen norms too: their twins learn, so that the base-net can become another."""
    net = adn.convert(tiny("rtdetr_r50vd", freeze_stem=False)).train()
    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.4, 0.4, 0.2, 0.2], [0.6, 0.5, 0.3, 0.2]])},
               {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    x = torch.rand(2, 3, 64, 64)
    of_super = net(x, targets)
    with adn.at_depth(net, "base"):
        of_base = net(x, targets)
    loss = sum(DetectionLoss()(of_super, targets).values())
    (loss + sum(DistillationLoss()(of_base, targets, of_super).values())).backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert not without
    assert net.get_parameter("backbone.res_layers.1.blocks.0.branch2b.norm.skip.weight").grad.any()


def test_position_table_follows_the_official_order() -> None:
    h, w, dim = 2, 3, 8
    table = PositionTable(dim)(torch.zeros(1, 1, h, w))[0]
    for n in range(h * w):
        x, y = n // h, n % h
        omega = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
        expected = torch.cat([torch.sin(x * omega), torch.cos(x * omega), torch.sin(y * omega), torch.cos(y * omega)])
        torch.testing.assert_close(table[n], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_boxes_stay_exact_in_half_precision(way: str, dtype: torch.dtype) -> None:
    """They are as near to those of float32 as the features allow, not as numbers of half precision are to each other:
    that alone would be off by 1e-3 (bfloat16) at the mean."""
    net, x = tiny().double(), torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for head in net.decoder.dec_bbox_head:
            head.layers[-1].weight.zero_()  # what is left of a box: its anchor and the encoder's head
        net.decoder.enc_bbox_head.layers[-1].weight.zero_()
        expected = net(x.double())
        net.float()
        if way == "weights":
            got = net.to(dtype)(x.to(dtype))
        else:
            with torch.autocast("cpu", dtype):
                got = net(x)
    assert got["pred_boxes"].dtype == torch.float32
    of_token = {(i, int(token)): box for i in range(2) for token, box in
                zip(expected["query_index"][i], expected["pred_boxes"][i])}
    common = [(of_token[i, int(token)], box) for i in range(2) for token, box in
              zip(got["query_index"][i], got["pred_boxes"][i]) if (i, int(token)) in of_token]
    assert len(common) > 20
    for a, b in common:
        torch.testing.assert_close(b.double(), a, rtol=0, atol=1e-5)


def test_boxes_in_training_stay_exact_in_half_precision() -> None:
    net = tiny().train()
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.2, 0.2]])}]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(torch.rand(1, 3, 64, 64), targets)
    for head in (outputs, *outputs["aux_outputs"], *outputs["dn_aux_outputs"]):
        assert head["pred_boxes"].dtype == torch.float32


def test_one_bottleneck_in_each_block_leaves_the_decoder_its_depth() -> None:
    net = adn.convert(tiny(depth_mult=0.3))
    assert str(adn.get_depth(net)) == "FFFF|3"
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        found = []
        for depth in ("FFFF|3", "FFFF|2", "FFFF|1"):
            with adn.at_depth(net, depth):
                found.append(net(x)["pred_logits"])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_a_fresh_head_is_in_the_mode_of_the_net() -> None:
    net = adn.convert(tiny()).eval()
    net.reset_classifier(7)
    assert not any(module.training for module in net.modules())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced() -> None:
    static = adn.extract(adn.convert(tiny()), "base")
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected = static(x)
        for got in (torch.jit.trace(static, x, strict=False)(x), torch.export.export(static, (x,)).module()(x)):
            assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in expected.items())


# --------------------------------------------------------------------------------------------- backbones, by keyword


def test_arguments_of_another_backbone() -> None:
    """Those of the named model's own are kept where they mean something."""
    def backbone(**kwargs: object) -> nn.Module:
        return adn.create_model("anydepth_rtdetr_r50vd", **TINY, **kwargs).backbone

    assert isinstance(backbone(backbone="resnet18").layer2[0].downsample[0], nn.AvgPool2d)
    own = backbone(backbone="resnet18", backbone_args={"stem_width": 16, "stem_type": "deep"})
    assert isinstance(own.layer2[0].downsample[0], nn.AvgPool2d)
    assert own.conv1[0].out_channels == 16
    assert not isinstance(backbone(backbone="resnet18", backbone_args={"avg_down": False}).layer2[0].downsample[0],
                          nn.AvgPool2d)
    assert len(backbone(backbone="presnet18", backbone_args={"width": 8}).res_layers) == 4
    assert backbone(backbone="regnetx_002").stem.conv.weight.requires_grad is False


@pytest.mark.parametrize(("backbone", "first"), [
    ("convnext_atto", "stem_0.weight"), ("resnet18", "conv1.weight"), ("mobilenetv2_035", "conv_stem.weight"),
    ("resnet26d", "conv1.0.weight")])
def test_frozen_stem(backbone: str, first: str) -> None:
    net = RTDETR(backbone, **TINY, freeze_stem=True)
    assert not net.backbone.get_parameter(first).requires_grad
    assert net.backbone.get_parameter([name for name, _ in net.backbone.named_parameters()][-1]).requires_grad


def test_a_stem_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"the stem of this .* freeze_stem=False"):
        RTDETR("dla34", **TINY, freeze_stem=True)


def test_where_weights_came_from_is_not_stored(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has weights of its own: to load it, or to save, reads no other file and downloads nothing."""
    asked = []
    plain = timm.create_model

    def create(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
        asked.append((pretrained, kwargs.pop("checkpoint_path", "")))
        return plain(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    net = adn.convert(adn.create_model("rtdetr_r18vd", **TINY, backbone="resnet18",
                                       backbone_args={"pretrained": True, "checkpoint_path": "some.pth"}))
    assert asked == [(True, "some.pth")]
    adn.save(net, tmp_path / "net.safetensors")
    again = adn.load(tmp_path / "net.safetensors")
    assert set(asked[1:]) == {(False, "")}
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="say where weights come from"):
        adn.models.registry.build_source("rtdetr_r18vd", {"backbone_args": {"pretrained_cfg_overlay": {"url": "x"}}})


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 3, 60, 64), "multiples of 32"), ((1, 3, 64, 0), "multiples of 32"), ((3, 64, 64), "pass .B, 3, H, W."),
    ((1, 1, 64, 64), "pass .B, 3, H, W."), ((1, 3, 32, 32), "21 places for 22 queries")])
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    net = adn.create_model("rtdetr_r18vd", **TINY | {"queries": 22}, backbone_args={"width": 8}).eval()
    for each in (net, fuse(adn.convert(net, inplace=False))):
        with pytest.raises(ValueError, match=message):
            each(torch.zeros(shape))


def test_images_of_bytes() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8; pass floating numbers"):
        tiny()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("images", [0, 1, 3])
def test_targets_of_other_images(images: int) -> None:
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.2, 0.2]])}] * images
    with pytest.raises(ValueError, match=f"targets of {images} images for a batch of 2"):
        tiny().train()(torch.rand(2, 3, 64, 64), targets)


def test_depths_of_other_models() -> None:
    net = adn.convert(tiny())
    for depth in ("TTTT", "TTTT|T", "TTTT|T|4", "TTTTT|0", [True] * 6):
        with pytest.raises(ValueError, match=r"depth|layers"):
            adn.set_depth(net, depth)
    assert adn.get_depth(net) == adn.Depth("FFFF|F|3")


def test_weights_for_another_number_of_classes() -> None:
    net = tiny()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    other = adn.create_model("rtdetr_r18vd", **TINY | {"num_classes": 7}, backbone_args={"width": 8})
    with pytest.raises(adn.CheckpointError, match=r"of other shape: .*denoising_class_embed"):
        adn.load_weights(other, state)
    report = adn.load_weights(other, state, strict=False)
    assert all("class_embed" in name or "score_head" in name for name in report.mismatched)
    assert len(report.mismatched) == 1 + 2 + 2 * 3


def test_unknown_names_and_settings() -> None:
    with pytest.raises(ValueError, match="unknown model"):
        adn.create_model("rtdetr_r99vd")
    with pytest.raises(ValueError, match="no weights of rtdetr_r18vd to download"):
        adn.create_model("rtdetr_r18vd", pretrained=True)
    with pytest.raises(ValueError, match=r"is not any-depth and has no twins: adn.convert\(model, twins='copy'\)"):
        adn.create_model("rtdetr_r18vd", twins="copy")
    with pytest.raises(ValueError, match="twins"):
        adn.create_model("anydepth_rtdetr_r50vd", twins="bogus", **TINY, backbone="resnet18")
    for name in ("num_classes", "queries", "decoder_layers", "points", "heads"):
        with pytest.raises(ValueError, match=f"{name}=0; pass at least 1"):
            RTDETR("presnet18", **TINY | {name: 0})
    with pytest.raises(ValueError, match="30 and 32 for 4 heads"):
        RTDETR("presnet18", **TINY | {"hidden": 30})
    with pytest.raises(ValueError, match="no backbone 'resnot'"):
        RTDETR("resnot")
    with pytest.raises(ValueError, match="strides"):
        RTDETR("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="channels last"):
        RTDETR("swin_tiny_patch4_window7_224", backbone_args={"img_size": 64})
    with pytest.raises(ValueError, match="there are 18, 34, 50, 101"):
        RTDETR("presnet19")
