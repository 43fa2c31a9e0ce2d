from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from torch import nn

import adn
from adn.distill import distillation_kl, pool_features


def a_batch(classes: int = 10, size: int = 32, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g).double(), torch.randint(0, classes, (n,), generator=g)


def a_net(name: str = "resnet18", **kwargs) -> nn.Module:
    return adn.convert(build(name, num_classes=10, **kwargs)).double().train()


class TestKL:
    @pytest.mark.parametrize("top", [None, 1, 7, 500])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_is_the_formula(self, top: int | None, temperature: float) -> None:
        g = torch.Generator().manual_seed(0)
        t, s = torch.randn(5, 11, generator=g).double(), torch.randn(5, 11, generator=g).double()
        rows = []
        for a, b in zip(t, s, strict=True):
            chosen = a.argsort(descending=True)[: top or 11]
            p, q = (a[chosen] / temperature).softmax(0), (b[chosen] / temperature).softmax(0)
            rows.append((p * (p / q).log()).sum())
        expected = temperature**2 * torch.stack(rows).mean()
        torch.testing.assert_close(distillation_kl(t, s, temperature, top), expected)

    def test_the_teacher_is_constant_and_zero_means_equal(self) -> None:
        t = torch.randn(4, 9, requires_grad=True)
        s = t.detach().clone().requires_grad_()
        kl = distillation_kl(t, s, top_classes=5)
        assert kl.abs() < 1e-6
        distillation_kl(t, s * 2).backward()
        assert t.grad is None
        assert s.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        t, s = torch.randn(4, 100).to(dtype), torch.randn(4, 100).to(dtype)
        assert torch.equal(distillation_kl(t, s), distillation_kl(t.float(), s.float()))


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3, 4), 1), ((2, 7, 5), -1), ((2, 3, 4, 5), -1)])
def test_pooling(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape).double()
    pooled = pool_features(x, dim)
    assert pooled.shape == (2, 5)
    axes = tuple(i for i in range(1, len(shape)) if i != dim % len(shape))
    torch.testing.assert_close(pooled, x.mean(axes))


@pytest.mark.parametrize(("name", "kwargs"), [
    ("resnet18", {}), ("vit_tiny_patch16_224", {"img_size": 32}), ("swin_tiny_patch4_window7_224", {"img_size": 64}),
    ("mobilenetv2_050", {}),
])
def test_terms_and_gradients_are_those_of_the_definition(name: str, kwargs: dict) -> None:
    net = a_net(name, **kwargs).eval()
    x, y = a_batch(size=kwargs.get("img_size", 32))
    kd = adn.SelfDistillation(net, alpha=0.3, temperature=2.0, top_classes=4, features=(0, -1))
    got = kd(x, y)
    got["loss"].backward()

    other = copy.deepcopy(net)
    other.zero_grad()
    outputs, features = {}, {}
    for depth in ("super", "base"):
        with adn.at_depth(other, depth):
            taken = []
            chosen = [adn.stages(other)[0], adn.stages(other)[-1]]
            handles = [s.last_block.register_forward_hook(lambda _m, _a, o, to=taken: to.append(o))
                       for s in chosen]
            outputs[depth] = other(x)
            [h.remove() for h in handles]
            features[depth] = [pool_features(f, s.plan.channel_dim) for f, s in zip(taken, chosen, strict=True)]
    task = F.cross_entropy(outputs["super"], y)
    top = outputs["super"].detach().topk(4, 1).indices
    p, q = (outputs[d].gather(1, top) / 2 for d in ("super", "base"))
    kl = 4 * F.kl_div(q.log_softmax(1), p.detach().softmax(1), reduction="batchmean")
    kls = [4 * F.kl_div((b / 2).log_softmax(1), (a / 2).detach().softmax(1), reduction="batchmean")
           for a, b in zip(features["super"], features["base"], strict=True)]
    loss = 0.3 * task + 0.7 * (kl + sum(kls))
    loss.backward()

    torch.testing.assert_close(got["task"], task)
    torch.testing.assert_close(got["kl_logits"], kl)
    for stage, expected in zip(kd.features, kls, strict=True):
        torch.testing.assert_close(got[f"kl_{stage.name}"], expected)
    torch.testing.assert_close(got["super"], 0.3 * task)
    torch.testing.assert_close(got["base"], 0.7 * (kl + sum(kls)))
    torch.testing.assert_close(got["loss"], loss)
    assert kl > 0
    assert all(k > 0 for k in kls)
    for (key, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, key=key: f"{key}: {m}")


def test_which_side_learns() -> None:
    """Refinement blocks and the first norms learn from the labels only; the second norms from the KL only."""
    net = a_net()
    x, y = a_batch()
    losses = adn.SelfDistillation(net)(x, y)
    losses["base"].backward(retain_graph=True)
    for stage in adn.stages(net):
        assert all(p.grad is None for block in stage.refinement for p in block.parameters())
        assert all(net.get_submodule(n).weight.grad is None for n in stage.plan.norms)
        assert all(net.get_submodule(n).skip.weight.grad is not None for n in stage.plan.norms)
    net.zero_grad()
    losses["super"].backward()
    for stage in adn.stages(net):
        assert all(net.get_submodule(n).skip.weight.grad is None for n in stage.plan.norms)
        assert all(p.grad is not None for block in stage.refinement for p in block.parameters())


@pytest.mark.parametrize("variant", ["neurips", "eq8", "labels"])
def test_two_backwards_equal_one(variant: str) -> None:
    one, two = a_net(), a_net()
    x, y = a_batch()
    a = adn.SelfDistillation(one, variant=variant)(x, y)
    a["loss"].backward()
    b = adn.SelfDistillation(two, variant=variant).backward(x, y)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value.detach(), b[key], msg=lambda m, key=key: f"{key}: {m}")
        assert not b[key].requires_grad
    for (key, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, key=key: f"{key}: {m}")
    for p, q in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(p, q)


def test_variants() -> None:
    x, y = a_batch()
    eq8 = adn.SelfDistillation(a_net().eval(), variant="eq8")(x, y)
    explicit = adn.SelfDistillation(a_net().eval(), features="all", top_classes=None)(x, y)
    assert {k for k in eq8 if k.startswith("kl_")} == {"kl_logits", *(f"kl_layer{i}" for i in range(1, 5))}
    torch.testing.assert_close(eq8["loss"], explicit["loss"])

    net = a_net().eval()
    labels = adn.SelfDistillation(net, variant="labels")(x, y)
    with adn.at_depth(net, "base"):
        base = F.cross_entropy(net(x), y)
    torch.testing.assert_close(labels["loss"], (F.cross_entropy(net(x), y) + base) / 2)
    assert not any(k.startswith("kl_") for k in labels)


def test_label_smoothing_and_mixed_targets() -> None:
    net = a_net().eval()
    x, y = a_batch()
    rows = F.one_hot(y, 10).double() * 0.7 + 0.3 * F.one_hot(y.roll(1), 10)
    losses = adn.SelfDistillation(net, nn.CrossEntropyLoss(label_smoothing=0.1))(x, rows)
    smooth = 0.9 * rows + 0.01
    torch.testing.assert_close(losses["task"], -(smooth * net(x).log_softmax(1)).sum(1).mean())


def test_a_batch_of_one_and_features() -> None:
    net = a_net().eval()
    x, y = a_batch(n=1)
    losses = adn.SelfDistillation(net, features="all")(x, y)
    assert losses["loss"].isfinite()


def test_depth_is_restored_and_counts_are_the_references() -> None:
    net = a_net()
    adn.set_depth(net, "TFFF")
    x, y = a_batch()
    adn.SelfDistillation(net)(x, y)
    assert str(adn.get_depth(net)) == "TFFF"
    assert net.bn1.num_batches_tracked == 2
    assert net.layer2[0].downsample[1].num_batches_tracked == 2
    assert net.layer1[0].bn1.num_batches_tracked == 1
    assert net.layer1[0].bn1.skip.num_batches_tracked == 1
    assert net.layer1[1].bn1.num_batches_tracked == 1


def test_scaled_backward() -> None:
    one, two = a_net(), a_net()
    x, y = a_batch()
    adn.SelfDistillation(one).backward(x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    adn.SelfDistillation(two).backward(x, y, scaler)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(8 * p.grad, q.grad)


def test_autocast() -> None:
    net = a_net().float()
    x, y = a_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = adn.SelfDistillation(net, features="all")(x.float(), y)
    assert losses["kl_logits"].dtype == torch.float32
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("settings", "message"), [
    ({"alpha": 1.2}, "between 0 and 1"), ({"alpha": -0.1}, "between 0 and 1"), ({"temperature": 0}, "above 0"),
    ({"top_classes": 0}, "None for all"),
    ({"features": ["layer9"]}, r"'layer9'.*layer1"), ({"features": [4]}, "below 4"),
    ({"features": "layer9"}, "layer9"), ({"variant": "eq9"}, "'eq8'"),
    ({"variant": "labels", "features": "all"}, "empty"),
])
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adn.SelfDistillation(a_net(), **settings)


def test_needs_a_converted_classifier() -> None:
    with pytest.raises(ValueError, match="not any-depth"):
        adn.SelfDistillation(build("resnet18"))
    features = adn.convert(build("resnet18", features_only=True))
    with pytest.raises(ValueError, match="returns list"):
        adn.SelfDistillation(features)(torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
