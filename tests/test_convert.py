"""Conversion: every family, every depth, against the source model; and everything a user may do to a converted net."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import timm
import torch
import torchvision
from conftest import build, few, randomise
from torch import nn

import adn
from adn.core import behaviours
from adn.families import FAMILIES

# (family, names): 3 to 12 of each. Small inputs and reduced widths where a model allows, so that all run on a laptop.
MODELS = {
    "resnet": ["resnet18", "resnet34", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "seresnet50",
               "resnetblur50", "ecaresnet26t", "tv_resnet18", "tv_resnet50", "tv_wide_resnet50_2"],
    "resnetv2": ["resnetv2_50", "resnetv2_50d", "resnetv2_50x1_bit", "resnetv2_50d_evos"],
    "mobilenet": ["mobilenetv2_100", "mobilenetv2_050", "mobilenetv3_large_100", "mobilenetv3_small_075",
                  "efficientnet_b0", "efficientnet_b1", "efficientnetv2_rw_t", "mobilenetv4_conv_small",
                  "tv_mobilenet_v2", "tv_mobilenet_v3_large", "tv_mobilenet_v3_small", "tv_efficientnet_b0"],
    "vit": ["vit_tiny_patch16_224", "vit_small_patch32_224", "deit_tiny_patch16_224",
            "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "tv_vit_b_32"],
    "swin": ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "tv_swin_t",
             "tv_swin_v2_t"],
    "convnext": ["convnext_atto", "convnext_pico", "convnextv2_atto", "tv_convnext_tiny"],
    "regnet": ["regnetx_002", "regnety_002", "regnetz_005", "regnetv_040", "tv_regnet_y_400mf", "tv_regnet_x_400mf"],
    "residual": ["pvt_v2_b0", "starnet_s1", "eva02_tiny_patch14_224", "mambaout_femto", "edgenext_xx_small", "gernet_s",
                 "ghostnet_100", "regnetz_b16", "twins_svt_small", "tv_mnasnet0_5", "tv_maxvit_t", "fastvit_t8"],
}
OWN_SIZE = ("eva02_tiny_patch14_224", "tv_maxvit_t")
NAMES = [name for names in MODELS.values() for name in names]
# Of each library and kind of block the quick ones.
IN_CI = ["resnet18", "tv_resnet18", "resnetv2_50d", "mobilenetv3_small_075", "tv_mobilenet_v3_small",
         "vit_tiny_patch16_224", "tv_swin_v2_t", "convnextv2_atto", "tv_regnet_x_400mf", "pvt_v2_b0"]
SIZED = ("vit", "deit", "swin")  # timm models built for one input size


def net_and_input(name: str, size: int = 64) -> tuple[nn.Module, torch.Tensor]:
    kwargs = {"num_classes": 10}
    if name in OWN_SIZE:
        size = 224
    if name.startswith("tv_vit"):
        kwargs["image_size"] = size
    elif name.startswith(SIZED) and not name.startswith("tv_"):
        kwargs["img_size"] = size
    return build(name, **kwargs), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def stated_sample(net: nn.Module) -> list[adn.Depth]:
    """All depths, or where there are more than 64: the two extremes, the chain between them and each flag alone."""
    n = len(adn.get_depth(net))
    if n <= 6:
        return adn.depths(net)
    chain = [[i < k for i in range(n)] for k in range(n + 1)]
    alone = [[i == k for i in range(n)] for k in range(n)]
    return [adn.Depth(d) for d in chain + alone]


def test_at_least_forty_names() -> None:
    assert len(NAMES) >= 40
    assert all(3 <= len(names) <= 12 for names in MODELS.values())


@pytest.mark.parametrize("name", few(NAMES, IN_CI.__contains__))
def test_family(name: str, table: list) -> None:
    family = next(f for f, names in MODELS.items() if name in names)
    every_depth(name, family, *net_and_input(name), table)


# Of timm, those of which a family does not know the blocks.
MODULES = [module for module in timm.list_modules()
           if not any(module in family.timm_modules for family in FAMILIES.values())]


LARGEST = 200_000_000  # parameters of models that are tried at every depth


@pytest.mark.full
@pytest.mark.parametrize("module", MODULES)
def test_module_of_timm(module: str, table: list) -> None:
    """The three smallest models of a module of timm, at the size that they are built for."""
    listed = [name.removeprefix("anydepth_") for name in adn.list_models()]
    models = {}
    for name in set(listed).intersection(timm.list_models(module=module)):
        with torch.device("meta"):
            models[name] = timm.create_model(name, num_classes=10)
    if not models:
        pytest.skip("nothing to bypass in any")
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    if min(sizes.values()) > LARGEST:
        pytest.skip(f"the smallest has {min(sizes.values()) / 1e6:.0f} M parameters, which takes half an hour")
    for name in sorted((name for name in models if sizes[name] <= LARGEST), key=sizes.__getitem__)[:3]:
        x = torch.randn(1, *models[name].pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))
        every_depth(name, None, build(name, num_classes=10), x, table)


def every_depth(name: str, family: str | None, model: nn.Module, x: torch.Tensor, table: list) -> None:
    """Convert a model of a family (None = whichever) and compare all depths, or of very many a sample."""
    source = copy.deepcopy(model)
    with torch.inference_mode():
        expected = source(x)
        found = adn.plan(model).family
        assert found == (family or found)
        net = adn.convert(model)
        assert net is model
        assert isinstance(net, type(source))
        assert set(source.state_dict()) == {k for k in net.state_dict() if ".skip." not in k}
        assert torch.equal(net(x), expected), "the super-net is the source, bit for bit"

        stages = adn.stages(net)
        for stage in stages:
            norms = [m for block in stage.essential for n, m in block.named_modules()
                     if behaviours.is_norm(m) and not n.endswith("skip")]
            with_twin = [m for m in norms if isinstance(m, behaviours.SkipNorm)]
            assert with_twin or not norms, stage.name
            exempt = {n for block in stage.essential for n, m in block.named_modules()
                      if behaviours.is_norm(m) and not n.endswith("skip") and not isinstance(m, behaviours.SkipNorm)}
            # Shortcuts see the stage's input; query/key norms belong to attention, not to the residual stream.
            of_attention = ("q_norm", "k_norm", "norm_q", "norm_k")
            assert all("downsample" in n or "shortcut" in n or n.startswith("proj") or n.endswith(of_attention)
                       for n in exempt), exempt

        called: list[str] = []
        # CoaT's blocks share what tells tokens their places.
        shared = {m for stage in stages for block in stage.essential for m in block.modules()}
        hooks = [m.register_forward_hook(lambda _m, _a, _o, name=stage.name: called.append(name))
                 for stage in stages for block in stage.refinement for m in block.modules() if m not in shared]
        outputs = {}
        for depth in stated_sample(net):
            adn.set_depth(net, depth)
            called.clear()
            outputs[depth] = net(x)
            assert outputs[depth].isfinite().all()
            ran = set(called)
            assert ran == {s.name for s, bypassed in zip(stages, depth, strict=True) if not bypassed}, depth
        assert torch.equal(outputs[adn.Depth([False] * len(stages))], expected)
        distinct = {out.numpy().tobytes() for out in outputs.values()}
        assert len(distinct) == len(outputs), "every depth computes something else"
        for hook in hooks:
            hook.remove()
        for depth in list(outputs)[1::max(1, len(outputs) // 3)]:
            # The copy lies elsewhere in memory; on some CPUs a product is rounded otherwise where it is not aligned.
            torch.testing.assert_close(adn.extract(net, depth)(x), outputs[depth], rtol=1e-6, atol=1e-6)
    base = outputs[adn.Depth([True] * len(stages))]
    table.append({
        "model": name, "family": found, "depths": 2 ** len(stages), "depths_run": len(outputs),
        "twins": sum(len(stage.plan.norms) for stage in stages),
        "super_difference": (outputs[adn.Depth([False] * len(stages))] - expected).abs().max().item(),
        "base_difference": f"{(base - expected).abs().max().item():.2e}",
    })


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "swin_tiny_patch4_window7_224", "tv_vit_b_32"])
def test_twins_are_used_and_only_while_bypassed(name: str) -> None:
    """Moving the second set moves base and not super, and the reverse."""
    model, x = net_and_input(name)
    net = adn.convert(model)
    with torch.inference_mode():
        before = {}
        for which in ("super", "base"):
            with adn.at_depth(net, which):
                before[which] = net(x)
        for stage_norm in [m for m in net.modules() if isinstance(m, behaviours.SkipNorm)]:
            stage_norm.skip.bias.add_(0.1)
        with adn.at_depth(net, "base"):
            assert not torch.equal(net(x), before["base"])
        assert torch.equal(net(x), before["super"])


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_one_stage_at_a_time(name: str) -> None:
    """Bypassing stage s by hand (identity blocks, twin norms) is what its flag does."""
    model, x = net_and_input(name)
    net = adn.convert(model)
    for s, stage in enumerate(adn.stages(net)):
        by_hand = copy.deepcopy(model)
        for block in stage.plan.refinement_blocks:
            by_hand.get_submodule(block).forward = lambda x: x
        for norm in stage.plan.norms:
            m = by_hand.get_submodule(norm)
            m.forward = m.skip.forward
        depth = adn.Depth([i == s for i in range(len(adn.stages(net)))])
        with torch.inference_mode(), adn.at_depth(net, depth):
            for m in net.modules():
                if isinstance(m, behaviours.SkipNorm):
                    m.skip.weight.mul_(1.5)
            for m in by_hand.modules():
                if isinstance(m, behaviours.SkipNorm):
                    m.skip.weight.mul_(1.5)
            assert torch.equal(net(x), by_hand(x))


def test_reference_splits() -> None:
    def split(name: str) -> list[tuple[int, int]]:
        return [(len(s.essential_blocks), len(s.refinement_blocks))
                for s in adn.plan(torchvision.models.get_model(name)).flagged]

    assert split("resnet50") == [(2, 1), (2, 2), (3, 3), (2, 1)]
    assert split("resnet101") == [(2, 1), (2, 2), (12, 11), (2, 1)]
    assert split("mobilenet_v2") == [(1, 1), (2, 1), (2, 2), (2, 1), (2, 1)]
    assert split("vit_b_16") == [(2, 1)] * 4
    assert split("swin_t") == [(1, 1), (1, 1), (3, 3), (1, 1)]


@pytest.mark.parametrize(("name", "twins", "source"), [
    ("resnet50", 26_112, 25_557_032), ("resnet101", 53_760, 44_549_160), ("mobilenet_v2", 22_672, 3_504_872),
    ("vit_b_16", 24_576, 86_567_656), ("vit_b_32", 24_576, 88_224_232), ("swin_t", 14_208, 28_288_354),
])
def test_reference_parameter_counts(name: str, twins: int, source: int) -> None:
    with torch.device("meta"):
        net = adn.convert(torchvision.models.get_model(name))
    own = sum(p.numel() for n, p in net.named_parameters() if ".skip." in n)
    assert (own, sum(p.numel() for p in net.parameters())) == (twins, source + twins)


@pytest.mark.parametrize(("depths", "switched"), [
    ((2, 1, 2, 2), {0: 2, 2: 3, 3: 3}), ((1, 2, 2, 2), {1: 3, 2: 3, 3: 3})])
def test_swin_with_a_stage_of_one_block(depths: tuple[int, ...], switched: dict[int, int]) -> None:
    """A merging norm follows the stage it leads into, or nothing if that one has no flag."""
    model = build("swin_tiny_patch4_window7_224", img_size=64, depths=depths)
    plan = adn.plan(model)
    assert {i: len(stage.norms) for i, stage in enumerate(plan) if stage.has_flag} == switched
    for i, stage in enumerate(plan):
        assert all(norm.startswith(f"layers.{i}.") for norm in stage.norms)


def test_vit_with_an_incomplete_group() -> None:
    model = build("vit_tiny_patch16_224", img_size=64, depth=8)
    plan = adn.plan(model)
    assert [(s.essential, s.has_flag) for s in plan] == [(2, True), (2, True), (2, False)]
    net = adn.convert(model)
    assert len(adn.depths(net)) == 4
    assert not any(isinstance(m, behaviours.SkipNorm) for m in net.blocks[6:].modules())


class TestTwins:
    def test_copy_is_the_default(self) -> None:
        net = adn.convert(build("resnet18"))
        norm = net.layer1[0].bn1
        for name, tensor in norm.skip.state_dict().items():
            assert torch.equal(tensor, norm.state_dict()[name])
            assert tensor.data_ptr() != norm.state_dict()[name].data_ptr()

    def test_fresh(self) -> None:
        twin = adn.convert(build("resnet18"), twins="fresh").layer1[0].bn1.skip
        assert (twin.weight == 1).all()
        assert (twin.bias == 0).all()
        assert (twin.running_mean == 0).all()
        assert (twin.running_var == 1).all()
        assert twin.num_batches_tracked == 0

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="copy"):
            adn.convert(build("resnet18"), twins="new")

    def test_frozen_norms_have_frozen_twins(self) -> None:
        model = build("resnet18")
        model.layer1[0].bn1.requires_grad_(False)
        net = adn.convert(model)
        assert not net.layer1[0].bn1.skip.weight.requires_grad
        assert net.layer1[1].bn1.weight.requires_grad

    def test_hooks_are_not_copied(self) -> None:
        model, x = net_and_input("resnet18")
        seen = []
        model.layer1[0].bn1.register_forward_hook(lambda *_: seen.append(1))
        net = adn.convert(model)
        with adn.at_depth(net, "base"):
            net(x)
        assert len(seen) == 1, "the hook of the module itself, not again for the twin"


class TestStateDict:
    @pytest.mark.parametrize("twins", ["copy", "fresh"])
    def test_a_plain_state_dict_loads_strictly_and_fills_the_twins(self, twins: str) -> None:
        plain = build("resnet18")
        other = randomise(build("resnet18"), seed=5)
        net = adn.convert(plain, twins=twins)
        for m in net.modules():
            if isinstance(m, behaviours.SkipNorm):
                m.skip.weight.data.fill_(9)
        net.load_state_dict(other.state_dict())
        norm = net.layer2[0].bn2
        assert torch.equal(norm.weight, other.layer2[0].bn2.weight)
        expected = norm.weight if twins == "copy" else torch.ones(128)
        assert torch.equal(norm.skip.weight, expected)
        assert norm.skip.weight.data_ptr() != norm.weight.data_ptr()

    def test_round_trip_ignores_depth(self) -> None:
        model, x = net_and_input("resnet18")
        net = adn.convert(model)
        adn.set_depth(net, "TFTF")
        for m in net.modules():
            if isinstance(m, behaviours.SkipNorm):
                m.skip.weight.data.mul_(1.3)
        other = adn.convert(build("resnet18", num_classes=10))
        other.load_state_dict(net.state_dict())
        assert str(adn.get_depth(other)) == "FFFF"
        adn.set_depth(other, "TFTF")
        assert torch.equal(net(x), other(x))

    def test_a_partial_set_of_twins_is_an_error(self) -> None:
        net = adn.convert(build("resnet18"))
        state = net.state_dict()
        del state["layer1.0.bn1.skip.weight"]
        with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1\.skip\.weight"):
            net.load_state_dict(state)
        whole_norm = {k: v for k, v in net.state_dict().items() if not k.startswith("layer1.0.bn1.skip.")}
        with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1\.skip\.weight"):
            net.load_state_dict(whole_norm)

    def test_a_plain_state_dict_of_a_part_of_a_model(self) -> None:
        """The net may be a child of something bigger."""
        bigger = nn.ModuleDict({"backbone": adn.convert(build("resnet18"))})
        source = nn.ModuleDict({"backbone": build("resnet18")})
        bigger.load_state_dict(source.state_dict())

    @pytest.mark.parametrize("twins", ["copy", "fresh"])
    def test_a_part_of_a_norm_leaves_its_twin_alone(self, twins: str) -> None:
        net = adn.convert(build("resnet18"), twins=twins)
        before = {k: v.clone() for k, v in net.state_dict().items() if ".skip." in k}
        net.load_state_dict({"fc.bias": torch.ones(1000), "layer1.0.bn1.weight": torch.ones(64)}, strict=False)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())

    def test_the_source_is_not_aliased_by_assign(self) -> None:
        net = adn.convert(build("resnet18"))
        net.load_state_dict(build("resnet18").state_dict(), assign=True)
        norm = net.layer1[0].bn1
        assert norm.weight.data_ptr() != norm.skip.weight.data_ptr()


class TestCopies:
    def test_deepcopy_and_pickle_keep_the_depth_and_are_independent(self) -> None:
        model, x = net_and_input("efficientnet_b0")
        net = adn.convert(model)
        adn.set_depth(net, "TTFFF")
        expected = net(x)
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
            assert behaviours.original_class(other) is behaviours.original_class(net)
            assert str(adn.get_depth(other)) == "TTFFF"
            assert torch.equal(other(x), expected)
            adn.set_depth(other, "super")
            assert str(adn.get_depth(net)) == "TTFFF"
            assert not torch.equal(other(x), expected)
            with torch.no_grad():
                other.conv_stem.weight.zero_()
            assert torch.equal(net(x), expected), "the copy runs its own weights"

    def test_not_in_place(self) -> None:
        model, x = net_and_input("resnet18")
        net = adn.convert(model, inplace=False)
        assert net is not model
        assert not any(isinstance(m, behaviours.Swapped) for m in model.modules())
        assert torch.equal(net(x), model(x))
        adn.convert(model)

    def test_two_threads_two_copies(self) -> None:
        model, x = net_and_input("resnet18")
        net = adn.convert(model)
        expected = {}
        for depth in ("super", "base"):
            with adn.at_depth(net, depth), torch.inference_mode():
                expected[depth] = net(x)
        wrong = []

        def work(depth: str) -> None:
            own = copy.deepcopy(net)
            adn.set_depth(own, depth)
            with torch.inference_mode():
                wrong.extend(depth for _ in range(10) if not torch.allclose(own(x), expected[depth], atol=1e-5))

        threads = [threading.Thread(target=work, args=(depth,)) for depth in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestWhatUsersDo:
    def test_set_depth_through_wrappers(self) -> None:
        net = adn.convert(build("resnet18"))
        wrapped = torch.compile(net, backend="eager")
        adn.set_depth(wrapped, "TFFT")
        assert str(adn.get_depth(net)) == "TFFT"
        assert adn.stages(wrapped)[0].name == "layer1"
        with pytest.raises(ValueError, match="not any-depth"):
            adn.set_depth(nn.Linear(1, 1), "T")

    def test_torch_compile_follows_the_depth(self) -> None:
        model, x = net_and_input("resnet18")
        net = adn.convert(model)
        compiled = torch.compile(net, backend="eager")
        with torch.inference_mode():
            for depth in ("FFFF", "TTTT", "TFTF", "FFFF"):
                adn.set_depth(compiled, depth)
                assert torch.equal(compiled(x), net(x)), depth

    def test_at_depth_restores_after_an_error(self) -> None:
        net = adn.convert(build("resnet18"))
        adn.set_depth(net, "TFFF")
        with pytest.raises(ZeroDivisionError), adn.at_depth(net, "base"):
            1 / 0  # noqa: B018
        assert str(adn.get_depth(net)) == "TFFF"

    def test_a_wrong_depth_changes_nothing(self) -> None:
        net = adn.convert(build("resnet18"))
        adn.set_depth(net, "TFFF")
        for wrong in ("TT", "TTTTT", "TXTT", [True, False], 3, None):
            with pytest.raises(ValueError, match="TT"):
                adn.set_depth(net, wrong)
        assert str(adn.get_depth(net)) == "TFFF"

    def test_train_and_eval_reach_the_twins(self) -> None:
        net = adn.convert(build("resnet18"))
        net.train()
        assert net.layer1[0].bn1.skip.training
        net.eval()
        assert not net.layer1[0].bn1.skip.training

    def test_only_the_live_bank_moves(self) -> None:
        model, x = net_and_input("mobilenetv2_100")
        net = adn.convert(model).train()
        for depth in ("FFFFF", "TTTTT", "TFFTF"):
            adn.set_depth(net, depth)
            before = {k: v.clone() for k, v in net.state_dict().items()}
            net.zero_grad()
            net(x).sum().backward()
            for stage, bypassed in zip(adn.stages(net), adn.get_depth(net), strict=True):
                for name in stage.plan.norms:
                    live, idle = (f"{name}.skip", name) if bypassed else (name, f"{name}.skip")
                    assert net.state_dict()[f"{live}.num_batches_tracked"] == before[f"{live}.num_batches_tracked"] + 1
                    assert not torch.equal(net.state_dict()[f"{live}.running_mean"], before[f"{live}.running_mean"])
                    for leaf in ("num_batches_tracked", "running_mean", "running_var"):
                        assert torch.equal(net.state_dict()[f"{idle}.{leaf}"], before[f"{idle}.{leaf}"]), idle
                    grads = {n: net.get_submodule(n).weight.grad for n in (live, idle)}
                    assert grads[live] is not None
                    assert grads[idle] is None, "no gradient for the idle bank, not a zero one"

    def test_channels_last_and_autocast(self) -> None:
        model, x = net_and_input("resnet50d")
        net = adn.convert(model)
        for depth in ("FFFF", "TFTT"):
            adn.set_depth(net, depth)
            with torch.inference_mode():
                expected = net(x)
                other = copy.deepcopy(net).to(memory_format=torch.channels_last)
                torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), expected,
                                           rtol=1e-3, atol=1e-3 * expected.abs().max().item())
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    half = net(x)
                assert half.dtype == torch.bfloat16
                assert (half.float() - expected).norm() < 0.05 * expected.norm()

    def test_drop_path_of_essential_blocks_is_off_while_bypassed(self) -> None:
        model = build("swin_tiny_patch4_window7_224", img_size=64, drop_path_rate=0.9)
        x = torch.randn(2, 3, 64, 64)
        net = adn.convert(model).train()
        runs = {depth: [] for depth in ("base", "super")}
        for depth, outputs in runs.items():
            adn.set_depth(net, depth)
            outputs.extend(net(x) for _ in range(2))
        assert torch.equal(*runs["base"]), "the student's forward is deterministic"
        assert not torch.equal(*runs["super"])

    def test_timm_feature_apis(self) -> None:
        for name in ("resnet18", "mobilenetv2_100", "convnext_atto", "regnety_002", "swin_tiny_patch4_window7_224",
                     "vit_tiny_patch16_224"):
            kwargs = {"img_size": 64} if name.startswith(SIZED) else {}
            x = torch.randn(1, 3, 64, 64)
            source = build(name, features_only=True, **kwargs)
            net = adn.convert(copy.deepcopy(source))
            with torch.inference_mode():
                for a, b in zip(net(x), source(x), strict=True):
                    assert torch.equal(a, b)
                adn.set_depth(net, "base")
                base = net(x)
                assert [f.shape for f in base] == [f.shape for f in source(x)], "all scales exist at every depth"
                assert not torch.equal(base[-1], source(x)[-1])
            whole = adn.convert(build(name, **kwargs))
            adn.set_depth(whole, "base")
            with torch.inference_mode():
                final, _ = whole.forward_intermediates(x)
                torch.testing.assert_close(final, whole.forward_features(x))
                assert whole.forward_head(final).shape == (1, 1000)
            whole.reset_classifier(7)
            assert whole(x).shape == (1, 7)

    @pytest.mark.parametrize(("name", "told"), [("resnet18", False), ("tv_resnet18", False), ("tv_mobilenet_v2", True)])
    def test_fx_feature_extraction_follows_the_depth(self, name: str, told: bool) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        model, x = net_and_input(name)
        node = "layer4" if "resnet" in name else "features.18"
        net = adn.convert(model)
        for traced_at in ("super", "base"):
            adn.set_depth(net, traced_at)
            leaves = {"leaf_modules": adn.fx_leaf_modules()} if told else {}
            extractor = create_feature_extractor(net, {node: "out"}, tracer_kwargs=leaves)
            for depth in ("super", "base", [True, *[False] * (len(adn.stages(net)) - 1)]):
                adn.set_depth(net, depth)
                seen = []
                handle = net.get_submodule(node).register_forward_hook(lambda _m, _a, out, to=seen: to.append(out))
                with torch.inference_mode():
                    net(x)
                handle.remove()
                with torch.inference_mode():
                    assert torch.equal(extractor(x)["out"], seen[0]), (traced_at, depth)

    def test_weight_decay_groups_and_layer_decay_of_timm(self) -> None:
        from timm.optim import param_groups_layer_decay, param_groups_weight_decay

        net = adn.convert(build("vit_tiny_patch16_224", img_size=64))
        no_decay, decay = param_groups_weight_decay(net, 0.05, net.no_weight_decay())
        twins = {id(p) for n, p in net.named_parameters() if ".skip." in n}
        assert twins <= {id(p) for p in no_decay["params"]}
        assert not twins & {id(p) for p in decay["params"]}
        groups = param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=0.7)
        assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))

    def test_averaged_copy_of_timm(self) -> None:
        from timm.utils import ModelEmaV3

        model, x = net_and_input("resnet18")
        net = adn.convert(model)
        ema = ModelEmaV3(net, decay=0.5)
        adn.set_depth(ema.module, "base")
        assert str(adn.get_depth(net)) == "FFFF"
        with torch.inference_mode(), adn.at_depth(net, "base"):
            assert torch.equal(ema.module(x), net(x))


class TestNorms:
    def test_sync_batchnorm_before_and_after(self) -> None:
        model, x = net_and_input("resnet18")
        before = adn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
        after = adn.convert(model)
        adn.set_depth(after, "TFTF")
        assert adn.convert_sync_batchnorm(after) is after
        assert str(adn.get_depth(after)) == "TFTF"
        for net in (before, after):
            sync = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
            assert len(sync) == len([m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
            assert isinstance(net.layer1[0].bn1.skip, nn.SyncBatchNorm)
            for depth in adn.depths(net):
                adn.set_depth(net, depth)
                assert net(x).isfinite().all()
        adn.set_depth(before, "TFTF")
        adn.set_depth(after, "TFTF")
        assert torch.equal(before(x), after(x))
        assert before.state_dict().keys() == after.state_dict().keys()

    def test_norms_with_activation_too(self) -> None:
        model, x = net_and_input("efficientnet_b0")
        net = adn.convert(model)
        adn.set_depth(net, "base")
        expected = net(x)
        adn.convert_sync_batchnorm(net)
        assert torch.equal(net(x), expected)

    @pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
    def test_freezing(self, name: str) -> None:
        model, x = net_and_input(name)
        net = adn.convert(model)
        adn.freeze_batch_norm(net)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
        assert any(isinstance(m, behaviours.SkipNorm) for m in net.modules())
        source = build(name, num_classes=10)
        for depth in ("super", "base"):
            with adn.at_depth(net, depth), adn.at_depth(plain := adn.convert(copy.deepcopy(source)), depth):
                torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-3)
        net.train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        net(x).sum().backward()
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "frozen statistics"

    @pytest.mark.parametrize("replace", [nn.SyncBatchNorm.convert_sync_batchnorm,
                                         timm.layers.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d])
    def test_foreign_replacement_is_noticed(self, replace, tmp_path) -> None:
        net = replace(adn.convert(build("resnet18")))
        for use in (lambda: adn.set_depth(net, "base"), lambda: adn.extract(net, "base"),
                    lambda: adn.convert_sync_batchnorm(net), lambda: adn.save(net, tmp_path / "net.safetensors")):
            with pytest.raises(RuntimeError, match=r"something replaced it .*convert_sync_batchnorm"):
                use()
        assert not any(tmp_path.iterdir())

    def test_a_replaced_twin_is_noticed(self) -> None:
        net = adn.convert(build("resnet18"))
        net.layer1[0].bn1.skip = nn.BatchNorm2d(64)
        with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1\.skip"):
            adn.set_depth(net, "base")

    def test_a_distillation_made_before_goes_on(self) -> None:
        net = adn.convert(build("resnet18", num_classes=10)).train()
        kd = adn.SelfDistillation(net, features="all")
        adn.freeze_batch_norm(net)
        assert kd(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))["loss"].isfinite()

    def test_a_wrapper_around_a_block_is_no_replacement(self) -> None:
        model, x = net_and_input("resnet18")
        net = adn.convert(model)
        with adn.at_depth(net, "base"):
            expected = net(x)
        net.layer1[1] = nn.Sequential(net.layer1[1])
        adn.set_depth(net, "base")
        assert torch.equal(net(x), expected)


class TestRefusals:
    def test_no_stages(self) -> None:
        with pytest.raises(adn.ConversionError, match=r"looked for the blocks of .*resnet.*plan="):
            adn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))

    def test_not_a_module(self) -> None:
        with pytest.raises(adn.ConversionError, match=r"str is no torch\.nn\.Module"):
            adn.convert("resnet50")

    def test_one_block_stages_only(self) -> None:
        with pytest.raises(adn.ConversionError, match=r"no stage .* has a block to bypass"):
            adn.convert(build("resnet10t"))

    def test_twice(self) -> None:
        net = adn.convert(build("resnet18"))
        before = net.state_dict().keys()
        for again in (net, nn.Sequential(net)):
            with pytest.raises(adn.ConversionError, match="already"):
                adn.convert(again)
        with pytest.raises(adn.ConversionError, match="already"):
            adn.plan(net)
        assert net.state_dict().keys() == before

    def test_wrapped(self) -> None:
        with pytest.raises(adn.ConversionError, match="convert the model first"):
            adn.convert(torch.compile(build("resnet18")))

    def test_is_a_value_error(self) -> None:
        assert issubclass(adn.ConversionError, ValueError)


class _Doubling:
    """A mixin that is no module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _WithMixin(_Doubling, torchvision.models.ResNet):
    pass


class _Disabled(torchvision.models.ResNet):
    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class _WithProperty(torchvision.models.ResNet):
    @property
    def _forward_impl(self) -> object:
        return lambda x: 4 * torchvision.models.ResNet._forward_impl(self, x)


@pytest.mark.parametrize("cls", [_WithMixin, _Disabled, _WithProperty])
def test_a_class_of_ones_own_keeps_its_methods(cls: type) -> None:
    torch.manual_seed(0)
    model = randomise(cls(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(adn.convert(model)(x), expected)


def test_every_node_of_the_first_block_can_be_extracted() -> None:
    model, x = net_and_input("resnet18")
    names = ["layer1.0.conv1", "layer1.0.act1", "layer2.0"]
    create = torchvision.models.feature_extraction.create_feature_extractor
    with torch.no_grad():
        expected = create(copy.deepcopy(model), names)(x)
        found = create(adn.convert(model), names)(x)
    assert all(torch.equal(found[name], expected[name]) for name in names)
