"""The reference implementation's numbers: every depth of its classifiers, and one training step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torchvision
from conftest import few
from torch import nn

import adn

# float32 deviation of the reference's own float32 run, as the specification states it.
DEVIATION = {"resnet50_adn": 4e-7, "swin_t_adn": 1.3e-6, "vit_b16_adn": 2.6e-6, "mobilenetv2_adn": 1.2e-4}
MODELS = {"resnet50_adn": "resnet50", "swin_t_adn": "swin_t", "vit_b16_adn": "vit_b_16",
          "mobilenetv2_adn": "mobilenet_v2"}


def reference_net(name: str, golden, seeded) -> tuple[nn.Module, dict, dict]:
    manifest, arrays = golden(name)
    net = adn.convert(torchvision.models.get_model(MODELS[name]), twins="fresh")
    adn.load_weights(net, seeded.reference_state(manifest))
    return net.eval(), manifest, arrays


@pytest.mark.parametrize("name", few(MODELS, lambda name: "vit" not in name))
def test_every_depth(name: str, golden, seeded) -> None:
    net, manifest, arrays = reference_net(name, golden, seeded)
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"])
    bound = 10 * DEVIATION[name]
    assert [str(d) for d in adn.depths(net)] == manifest["config_labels"]
    for i, (label, depth) in enumerate(zip(manifest["config_labels"], adn.depths(net), strict=True)):
        with torch.inference_mode(), adn.at_depth(net, depth):
            features = stage_outputs(net, x)
        logits = features.pop()
        error = np.abs(logits.numpy() - arrays["logits"][i]).max()
        assert error <= bound, f"{label}: logits off by {error:.1e}, allowed {bound:.1e}"
        for s, feature in enumerate(features):
            got = feature.double()
            stats = [got.mean().item(), got.std().item(), got.abs().max().item()]
            np.testing.assert_allclose(stats, arrays["stage_stats"][i, s], rtol=1e-5, atol=10 * bound,
                                       err_msg=f"{label} stage {s}")
            key = f"stage{s}_{label}"
            if key in arrays:
                every = manifest["subsample_k"][key]
                sample = feature.flatten()[::every][:256].numpy()
                np.testing.assert_allclose(sample, arrays[key], rtol=1e-4, atol=100 * bound, err_msg=key)


def stage_outputs(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of all stages at the depth that is set, then the logits."""
    taken: list[torch.Tensor] = []
    handles = [stage.last_block.register_forward_hook(lambda _m, _a, out: taken.append(out.contiguous()))
               for stage in adn.stages(net)]
    logits = net(x)
    for handle in handles:
        handle.remove()
    return [*taken, logits]


VARIANTS = ("plain", "fpn234", "fpn123", "options")


@pytest.mark.parametrize("dtype", few([torch.float32, torch.float64], lambda d: d == torch.float64), ids=str)
@pytest.mark.parametrize(("variant", "single_pass"), few(
    itertools.product(VARIANTS, [False, True]), lambda case: case == ("fpn234", True) or not case[1]))
def test_training_step(variant: str, single_pass: bool, dtype: torch.dtype, golden, seeded) -> None:
    """The reference computed in float64: there all must agree closely; in float32 within 10x its own deviation."""
    manifest, arrays = golden("resnet50_adn_step")
    config = manifest["configs"][variant]
    exact = dtype == torch.float64
    net = adn.convert(torchvision.models.resnet50(), twins="fresh")
    adn.load_weights(net, seeded.reference_state(manifest))
    net.to(dtype).train()
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"]).to(dtype)
    y = seeded.seeded_input(manifest["inputs"]["target"], manifest["seed"])

    kd = adn.SelfDistillation(
        net, nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"]), alpha=config["alpha"],
        temperature=config["temperature"], features=config["feature_layers"], single_pass=single_pass,
    )
    parameters = dict(net.named_parameters())
    buffers = dict(net.named_buffers())
    first = {}

    def keep_super() -> None:
        first.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    if single_pass:
        losses = kd(x, y)
        losses["super"].backward(retain_graph=True)
        keep_super()
        losses["base"].backward()
        losses = {name: value.detach() for name, value in losses.items()}
    else:
        # The base pass is the second forward; what is in .grad then is the first backward's alone.
        handle = net.register_forward_pre_hook(
            lambda *_: keep_super() if adn.get_depth(net) == adn.Depth("TTTT") else None)
        losses = kd.backward(x, y)
        handle.remove()

    def expect(key: str, got: object, deviation: str | None = None, atol: float = 0.0) -> None:
        """Relative agreement: 1e-6 in float64, else 10x the deviation of that name (1e-6 at least)."""
        rtol = 1e-6 if exact else 10 * max(1e-6, manifest["float32_deviation"][variant][deviation or key])
        np.testing.assert_allclose(np.asarray(got), arrays[f"{variant}.{key}"], rtol=rtol, atol=atol, err_msg=key)

    expect("loss_ce_super", losses["task"].item())
    expect("loss_kd_softmax", losses["kl_logits"].item())
    expect("loss_kd_features", [losses[f"kl_{name}"].item() for name in config["feature_layers"]])
    expect("loss_super_weighted", losses["super"].item(), "loss_ce_super")
    expect("loss_base_weighted", losses["base"].item(), "loss_kd_softmax" if variant == "plain" else "loss_kd_features")
    expect("loss_total", losses["loss"].item(), "loss_ce_super")
    logit_error = 1e-6 if exact else 10 * manifest["float32_deviation"][variant]["logits_base_abs"]
    for which in ("super", "base"):
        np.testing.assert_allclose(losses[f"{which}_logits"], arrays[f"{variant}.logits_{which}"], atol=logit_error)

    zero = torch.zeros(())
    first = {n: first.get(n, zero) for n in parameters}
    # What only one backward touches is exact; the base's share of a shared weight is a difference of two sums.
    second = {n: (p.grad if p.grad is not None else zero) - first[n] for n, p in parameters.items()}
    names = manifest["grad_params"]
    expect("grad_norm_super", norms(first, names), "grad_norm")
    expect("grad_norm_base", norms(second, names), atol=1e-6 if exact else 1e-5)
    expect("grad_norm_super_all", total_norm(first), "grad_norm")
    expect("grad_norm_base_all", total_norm(second), atol=1e-6 if exact else 1e-4)
    for name in names if exact else ():
        expect(f"grad_base:{name}", sample(second[native(name)], parameters[native(name)]), atol=1e-6)

    if config["clip"] is not None:
        nn.utils.clip_grad_norm_(net.parameters(), config["clip"])
    expect("grad_norm", norms({n: p.grad for n, p in parameters.items()}, names))
    expect("grad_norm_all", total_norm({n: p.grad for n, p in parameters.items()}), "grad_norm_all")

    setting = manifest["optimizer"]
    flat = [p for p in parameters.values() if p.ndim == 1]
    deep = [p for p in parameters.values() if p.ndim > 1]
    torch.optim.SGD([{"params": deep, "weight_decay": setting["weight_decay"]}, {"params": flat, "weight_decay": 0.0}],
                    lr=setting["lr"], momentum=setting["momentum"]).step()
    # Single elements of a float32 gradient through 53 batch norms of 4 images are noise of several per cent.
    for name in names if exact else ():
        expect(f"grad:{name}", sample(parameters[native(name)].grad), atol=1e-6)
        expect(f"after:{name}", sample(parameters[native(name)]), atol=1e-6)
    for name in manifest["buffers"]:
        expect(f"buf:{name}", buffers[native(name)], "loss_ce_super", atol=1e-6 if exact else 1e-5)
    counts = [buffers[native(name)].item() for name in manifest["num_batches_tracked_names"]]
    assert counts == arrays[f"{variant}.num_batches_tracked"].tolist()


def native(name: str) -> str:
    """The reference's name of a tensor in our naming."""
    return name.replace("_skip.", ".skip.")


def norms(grads: dict[str, torch.Tensor], names: list[str]) -> list[float]:
    return [grads[native(name)].double().norm().item() for name in names]


def total_norm(grads: dict[str, torch.Tensor]) -> float:
    return torch.stack([g.double().norm() for g in grads.values()]).norm().item()


def sample(tensor: torch.Tensor, like: torch.Tensor | None = None) -> np.ndarray:
    """The first 16 of every k-th element, as the fixture stores them; `like` gives the shape of a missing gradient."""
    tensor = tensor.detach() if like is None else tensor.detach().expand(like.shape)
    return tensor.flatten()[:: max(1, tensor.numel() // 16)][:16].numpy()
