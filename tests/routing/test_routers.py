"""Routers and what they learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adn.routers import AdvantageRouter, DifficultyRouter, pooled
from adn.routing.losses import MedianOffset, advantage_loss, correlation, offset_loss


@pytest.mark.parametrize("name", ["small", "dyyolov7"])
def test_difficulty_is_the_references(name: str, golden, dynamic) -> None:
    manifest, arrays = golden(f"dynamicdet_router_{name}")
    router = DifficultyRouter(manifest["configs"][0]["channels"])
    router.load_state_dict(dynamic.fixture_state(manifest))
    features = [dynamic.fixture_input(manifest, key) for key in manifest["inputs"]]
    easiness = router.easiness(features)
    np.testing.assert_allclose(easiness.detach(), np.asarray(arrays["score"])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(router(features), 1 - easiness)
    easiness.sum().backward()
    for key, parameter in router.named_parameters():
        found, wanted = parameter.grad.flatten()[:: manifest["grad_every"][key]], np.asarray(arrays[f"grad_{key}"])
        np.testing.assert_allclose(found, wanted.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "grid", "parameters"), [
    ("tinyconv", (2, 2), 103_185), ("tinyconv_g2x6", (2, 6), 3297), ("gapmlp", None, 101_905)])
def test_advantage_is_the_references(name: str, grid: tuple[int, int] | None, parameters: int, golden, dynamic
                                     ) -> None:
    manifest, arrays = golden(f"dynamicrouting_{name}")
    setting, = manifest["configs"]
    features = [dynamic.fixture_input(manifest, key) for key in ("iv", "pv")]
    channels = dict(zip(("input", "pred"), (x.shape[1] for x in features), strict=True))
    router = AdvantageRouter(channels, setting["group_dim"], setting["hidden_dim"], setting["path_dim"], grid).eval()
    router.load_state_dict(dynamic.fixture_state(manifest))
    assert sum(p.numel() for p in router.parameters()) == parameters
    mixed = torch.arange(len(features[0])) % 2
    for label, path in (("base", 0), ("super", 1), ("mixed", mixed)):
        found = router(features, path).detach()
        np.testing.assert_allclose(found, np.asarray(arrays[f"logit_{label}"]).flatten(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(router.train()(features, mixed).detach(),
                               np.asarray(arrays["logit_train_mixed"]).flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "mae", "huber", "corr"])
def test_losses_are_the_references(kind: str, golden, dynamic) -> None:
    manifest, arrays = golden("dynamicrouting_losses")
    found, base, full = (dynamic.fixture_input(manifest, key) for key in ("pred", "l_base", "l_super"))
    found.requires_grad_()
    full.requires_grad_()
    loss = advantage_loss(found, base, full, kind)
    loss.backward()
    assert loss.item() == pytest.approx(float(np.asarray(arrays[kind])), abs=1e-6)
    np.testing.assert_allclose(found.grad, np.asarray(arrays[f"{kind}_grad"]), rtol=0, atol=1e-6)
    assert full.grad is None
    a, b = found.detach().double(), (base - full).detach().double()
    assert correlation(a, b).item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


def test_offsets_are_the_references(golden, dynamic) -> None:
    """12,500 calls: at first a new median at each, then at every thousandth."""
    manifest, arrays = golden("dynamicdet_offset_loss")
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    calls = 12_500
    loss1 = dynamic.fixture_input(manifest, "l1") * 2 + torch.linspace(0.5, 1.5, calls)
    loss2 = dynamic.fixture_input(manifest, "l2") * 2 + torch.linspace(0.5, 0.9, calls)
    scores, tracker = dynamic.fixture_input(manifest, "score"), MedianOffset()
    stored = {int(step): i for i, step in enumerate(arrays["step_index"])}
    changes, before = [], None
    for t in range(calls):
        score = scores[t : t + 1].clone().requires_grad_()
        loss = offset_loss(score, loss1[t : t + 1], loss2[t : t + 1], tracker)
        if t > 9990 and tracker.offset != before:
            changes.append(t)
        before = tracker.offset
        if t in stored:
            loss.backward()
            wanted = [arrays[name].flatten()[stored[t]] for name in ("offset", "loss", "grad_score")]
            np.testing.assert_allclose([tracker.offset, loss.item(), score.grad.item()], wanted, rtol=0, atol=1e-6)
    assert changes == arrays["offset_changes_after_9990"].tolist()


def test_offset_goes_on_from_a_file(tmp_path) -> None:
    a, b = MedianOffset(4, 3), MedianOffset(4, 3)
    for saved in (0.5, 2.0, 1.0, 7.0):
        a(saved)
    assert a.offset == 1.0  # of the first three: the fourth call is no multiple of three
    torch.save(a.state_dict(), tmp_path / "offset.pt")
    b.load_state_dict(torch.load(tmp_path / "offset.pt", weights_only=True))
    assert [a(3.0), a(4.0)] == [b(3.0), b(4.0)] == [1.0, 2.5]
    with pytest.raises(ValueError, match="differ by nan"):
        a(float("nan"))
    assert a(0.0) == b(0.0)


def test_a_batch_is_its_images_one_after_the_other() -> None:
    one, whole = MedianOffset(), MedianOffset()
    easy, first, second = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    alone = [offset_loss(easy[i : i + 1], first[i : i + 1], second[i : i + 1], one) for i in range(6)]
    torch.testing.assert_close(offset_loss(easy, first, second, whole), torch.stack(alone).mean())


def test_pooling() -> None:
    x = torch.rand(2, 5, 6, 8)
    torch.testing.assert_close(pooled(x), x.mean((2, 3)))
    torch.testing.assert_close(pooled(x, (2, 4)), x.reshape(2, 5, 2, 3, 4, 2).mean((3, 5)))
    torch.testing.assert_close(pooled(x.flatten(2).mT), x.mean((2, 3)))
    assert pooled(x.half()).dtype == torch.float32
    assert pooled(x.double()).dtype == torch.float64


def test_what_is_refused() -> None:
    router = DifficultyRouter([4, 8])
    with pytest.raises(ValueError, match=r"features of \[4\] channels, the router is for \[4, 8\]: it was made for"):
        router([torch.rand(1, 4, 2, 2)])
    advantage = AdvantageRouter({"input": 4})
    with pytest.raises(ValueError, match=r"features of \[5\] channels, the router is for \[4\]"):
        advantage([torch.rand(1, 5, 2, 2)], 0)
    with pytest.raises(ValueError, match="which route made the features"):
        advantage([torch.rand(1, 4, 2, 2)])
    with pytest.raises(ValueError, match=r"channels=\[\], reduction=4"):
        DifficultyRouter([])
    with pytest.raises(ValueError, match="no group of features"):
        AdvantageRouter({})
    numbers = torch.rand(3)
    with pytest.raises(ValueError, match="kind='rank'; pass one of"):
        advantage_loss(numbers, numbers, numbers, "rank")
    with pytest.raises(ValueError, match=r"pass \(B,\) of each"):
        advantage_loss(numbers, numbers, numbers[:2])
    with pytest.raises(ValueError, match=r"pass \(B,\) of each"):
        offset_loss(numbers, numbers[:2], numbers, MedianOffset())
