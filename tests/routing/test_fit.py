"""Routers that are trained, by hand and by the command."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import adn
from adn.cli import main
from adn.core.state import stages
from adn.measure.average_precision import Detections
from adn.models.rtdetr.criterion import DetectionLoss as DETRLoss
from adn.models.yolov12.criterion import DetectionLoss as YOLOLoss
from adn.routing import AdvantageRouter, DifficultyRouter, ImageRouter, RoutedNet, ThresholdPolicy
from adn.routing.fit import Boxes, Guesses, Seen, at_cost, collect, fit_router, gains, scores_of
from adn.weights.checkpoint import read_metadata


def a_net(classes: int = 2) -> torch.nn.Module:
    net = randomise(adn.create_model("anydepth_resnet18", num_classes=classes))
    for module in net.modules():
        if "skip" in module._modules:
            randomise(module._modules["skip"], seed=3)
    return net.eval()


def two_kinds(count: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark images of class 0 and bright ones of class 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    return torch.randn(count, 3, size, size, generator=generator) + 2 * labels[:, None, None, None] - 1, labels


@pytest.mark.parametrize("kind", ["image", "inside", "stream"])
def test_losses_and_features_are_those_of_single_images(kind: str) -> None:
    net, (x, y) = a_net(), two_kinds(9)
    routed = {
        "image": lambda: RoutedNet(net, ImageRouter(size=12)),
        "inside": lambda: RoutedNet(adn.fuse(net), AdvantageRouter({"stage": 128}, path_width=0), shallow="TTTT",
                                    deep="TTFF", at=2),
        "stream": lambda: RoutedNet(net, DifficultyRouter([128]), decide="next", taps=[stages(net)[1].name]),
    }[kind]().eval()
    seen = collect(routed, [(x[:4], y[:4]), None, (x[4:], y[4:])], progress=False)
    for i, depth in enumerate(routed.depths):
        with adn.at_depth(net, depth), torch.no_grad():
            logits = net(x)
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none").double()
        torch.testing.assert_close(seen.losses[:, i], losses, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen.right[:, i], logits.argmax(1) == y)
    assert len(seen.features) == (2 if kind == "stream" else 1)
    with torch.no_grad():
        torch.testing.assert_close(scores_of(routed.router, seen), routed.score(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.advantages, seen.losses[:, 0] - seen.losses[:, 1])


def rtdetr(classes: int = 5) -> torch.nn.Module:
    return adn.convert(adn.create_model(
        "rtdetr_r18vd", num_classes=classes, queries=20, hidden=32, decoder_hidden=32, feedforward=32, heads=4,
        decoder_feedforward=32, decoder_layers=3, backbone_args={"width": 8}))


def of_transformers() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"])
    return adn.convert(transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(
        backbone_config=backbone, num_labels=5, encoder_in_channels=[16, 32, 64], encoder_hidden_dim=32, d_model=32,
        num_queries=10, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_in_channels=[32, 32, 32],
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3)))


DETECTORS = {
    "yolov12": (lambda classes=5: adn.create_model("anydepth_yolov12n", num_classes=classes, width=0.25), YOLOLoss,
                lambda outputs: outputs),
    "dyyolov7": (lambda classes=5: adn.create_model("dyyolov7", num_classes=classes, width=0.1), None, None),
    "rtdetr": (rtdetr, DETRLoss, lambda outputs: outputs),
    "transformers": (of_transformers, DETRLoss,
                     lambda outputs: {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}),
}


@pytest.mark.parametrize("kind", [kind for kind in DETECTORS if kind != "dyyolov7"])
def test_losses_of_detectors(kind: str) -> None:
    """Of each image what it would lose as a batch of its own, at both depths, objects or none."""
    make, criterion, outputs_of = DETECTORS[kind]
    torch.manual_seed(0)
    net = randomise(make()).double().eval()
    x = torch.rand(3, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    targets = [{"labels": torch.randint(5, (n,), generator=draw),
                "boxes": torch.rand(n, 4, generator=draw).double() * 0.4 + 0.2}
               for n in (2, 0, 5)]
    routed = RoutedNet(net, ImageRouter().double())
    seen = collect(routed, [(x[:2], targets[:2]), (x[2:], targets[2:])], progress=False)
    assert seen.right is None
    for i, depth in enumerate(routed.depths):
        for j, target in enumerate(targets):
            with adn.at_depth(net, depth), torch.no_grad():
                terms = criterion()(outputs_of(net(x[j : j + 1])), [target])
            assert seen.losses[j, i].item() == pytest.approx(sum(terms.values()).item(), rel=1e-6)
    assert seen.advantages.abs().min() > 0


def planted(count: int = 1200, noise: float = 0.3) -> Seen:
    """Features of which the sum of the first two says what the deep route saves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    saved = x[:, 0] + x[:, 1] + noise * torch.randn(count, generator=generator)
    losses = torch.stack([2 + saved / 2, 2 - saved / 2], 1).double()
    return Seen([[x]], losses, losses < 2)


@pytest.mark.parametrize("kind", ["mse", "huber", "corr"])
def test_learns_what_the_deep_route_saves(kind: str) -> None:
    seen = planted()
    torch.manual_seed(0)
    router = AdvantageRouter({"stage": 6}, 16, 16, path_width=0, grid=None)
    rows, held = fit_router(router, seen, epochs=20, batch_size=64, lr=1e-2, kind=kind, progress=False)
    assert len(held) == 240
    assert max(row.correlation for row in rows) > 0.9
    scores = scores_of(router, seen.part(held))
    found = float(np.corrcoef(scores, seen.part(held).advantages)[0, 1])
    assert found == pytest.approx(max(row.correlation for row in rows), abs=1e-5)  # the best state, not the last
    again = AdvantageRouter({"stage": 6}, 16, 16, path_width=0, grid=None)
    again.load_state_dict({name: value.clone() for name, value in router.state_dict().items()})
    assert torch.equal(scores, scores_of(again, seen.part(held)))


def test_both_routes_features() -> None:
    """Where the router sees what the executed route made, it learns from both."""
    seen = planted()
    (x,), = seen.features
    both = Seen([[x], [-x]], seen.losses, seen.right)
    torch.manual_seed(0)
    router = AdvantageRouter({"stage": 6}, 32, 32, grid=None)
    fit_router(router, both, epochs=40, batch_size=64, lr=1e-2, progress=False)
    for path, features in ((0, x), (1, -x)):
        with torch.no_grad():
            scores = router([features], path)
        assert np.corrcoef(scores, seen.advantages)[0, 1] > 0.85, path


def test_gains_are_the_definition() -> None:
    right = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.bool)
    rows = gains(Guesses(right), [0.1, 0.9, 0.3, 0.2, 0.5], (1.0, 3.0), shares=(0, 0.4, 1))
    assert [row.routed for row in rows] == [40, 80, 60]
    assert [row.deep for row in rows] == [0, 0.4, 1]
    assert [row.random for row in rows] == pytest.approx([40, 48, 60])
    assert [row.best for row in rows] == [40, 80, 60]
    assert [row.cost for row in rows] == pytest.approx([1, 1.8, 3])
    other, = gains(Guesses(right), [0.1, 0.9, 0.3, 0.2, 0.5], (1.0, 3.0), calibration=[0.15, 0.25, 0.35], shares=(0.5,))
    assert other.deep == 0.6  # 0.25 parts these otherwise than those
    assert at_cost([(1, 50.0), (2, 70.0), (3, 60.0)], 2.5) == 70
    with pytest.raises(ValueError, match=r"no depth costs 0\.5 or less; the cheapest costs 1"):
        at_cost([(1, 50.0)], 0.5)


def test_what_cannot_be_learnt() -> None:
    router = AdvantageRouter({"stage": 6}, path_width=0, grid=None)
    with pytest.raises(ValueError, match="3 images are too few to train a router on"):
        fit_router(router, planted(3), progress=False)
    with pytest.raises(ValueError, match="held_out=1"):
        fit_router(router, planted(), held_out=1, progress=False)
    with pytest.raises(ValueError, match="no image to learn from"):
        collect(RoutedNet(a_net(), ImageRouter()), [], progress=False)
    with pytest.raises(ValueError, match="labels from 0 to 7, but the net has 2 classes"):
        collect(RoutedNet(a_net(), ImageRouter()), [(torch.rand(2, 3, 24, 24), torch.tensor([0, 7]))], progress=False)
    with torch.device("meta"):
        detector = adn.create_model("anydepth_fasterrcnn_resnet50_fpn")
    with pytest.raises(ValueError, match="what single images lose is not known of this detector: a router"):
        collect(RoutedNet(detector, ImageRouter()), [], progress=False)


# ---------------------------------------------------------------------------------------------------------- the command


def folder_of(path: Path, count: int) -> Path:
    x, labels = two_kinds(count)
    for i, (image, label) in enumerate(zip(x, labels.tolist(), strict=True)):
        place = path / ("dark", "bright")[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = ((image * 40 + 128).clamp(0, 255)).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
    return path


@pytest.mark.parametrize("inside", [False, True])
def test_command(inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
                 ) -> None:
    torch.manual_seed(0)
    data = folder_of(tmp_path / "data", 160)
    net, routed = tmp_path / "net.safetensors", tmp_path / "out" / "routed.safetensors"
    adn.save(a_net(), net, class_names=["bright", "dark"], extra={"data": {"size": 24, "resize": 24}})
    depths = ["--shallow", "TTTT", "--deep", "TTFF", "--at", "2"] if inside else ["--image-size", "12"]
    options = ["--workers", "0", "--batch-size", "32", "--device", "cpu"]
    assert main(["route", "fit", str(net), str(data), "--out", str(routed), "--epochs", "15", "--lr", "0.01",
                 "--share", "0.25", *depths, *options]) == 0
    said = capsys.readouterr().out
    assert "correlation of scores and savings on 32 held-out images: 0." in said
    assert f"25% of images run at {'TTFF' if inside else 'FFFF'}, the others at TTTT" in said
    table, figure = tmp_path / "gains.csv", tmp_path / "gains.png"
    assert main(["route", "eval", str(routed), str(data), "--csv", str(table), "--plot", str(figure), *options]) == 0
    said = capsys.readouterr().out
    assert "single depths: FFFF" in said
    assert figure.stat().st_size > 1000
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows].count("router") == 11
    assert sum(row["kind"].startswith("depth ") for row in rows) == 16
    found = [row for row in rows if row["kind"] == "router"]
    single = {row["kind"]: row for row in rows if row["kind"] != "router"}
    # Four convolutions of 3 x 3 and a linear layer; a 1 x 1 and a depthwise convolution and two linear layers.
    router_mmacs = (128 * 64 * 4 + 9 * 64 * 4 + 64 * 64 + 64 if inside else
                    9 * (3 * 16 * 144 + 16 * 32 * 36 + 32 * 64 * 9 + 64 * 64 * 4) + 64) / 1e6
    for share, depth in ((0, "TTTT"), (-1, "TTFF" if inside else "FFFF")):
        assert found[share]["top1"] == single[f"depth {depth}"]["top1"]
        more = float(found[share]["mmacs"]) - float(single[f"depth {depth}"]["mmacs"])
        assert more == pytest.approx(router_mmacs), "what the router costs"
    capsys.readouterr()
    monkeypatch.setattr(RoutedNet, "measure", lambda *_, **__: (2.0, 1.0))
    assert main(["route", "threshold", str(routed), "--target-ms", "1e9", "--device", "cpu"]) == 2
    assert "takes no longer here than TTTT: time more forwards" in capsys.readouterr().err
    monkeypatch.setattr(RoutedNet, "measure", lambda *_, **__: (1.0, 2.0))
    assert main(["route", "threshold", str(routed), "--target-ms", "1e9", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "is above what the deep route costs" in said.err
    assert "100.0% of images take the deep route" in said.out
    again = adn.load(routed)
    assert again.policy.tau == -float("inf")
    assert again.policy.costs == (1.0, 2.0)
    other = tmp_path / "other.safetensors"
    assert main(["route", "threshold", str(routed), "--share", "0.5", "--out", str(other), "--device", "cpu"]) == 0
    assert isinstance(adn.load(other).policy, ThresholdPolicy)
    assert read_metadata(other)["extra"] == read_metadata(routed)["extra"]
    # What the file does: of these images about half take the deep route.
    loader = DataLoader(TensorDataset(*two_kinds(40)), 20)
    assert len(adn.load(other).scores(loader)) == 40


@pytest.mark.parametrize(("command", "message"), [
    ("route eval {net} {data}", r"has no router: adn route fit .*net.safetensors DATA --out FILE trains one"),
    ("route threshold {routed} --target-ms 5", "does not hold the scores that thresholds are chosen by"),
    ("route fit {routed} {data} --out x", "has a router already"),
    ("route fit {net} {data} --out x --at 1", "the depths TTTT and FFFF part at flag 0 already"),
    ("eval {data} --checkpoint {routed}", "has a router, which chooses depths by itself: adn route eval"),
])
def test_what_the_command_refuses(command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = folder_of(tmp_path / "data", 4)
    net, routed = tmp_path / "net.safetensors", tmp_path / "routed.safetensors"
    adn.save(a_net(), net)
    adn.save(RoutedNet(a_net(), ImageRouter()), routed)
    assert main([*command.format(net=net, routed=routed, data=data).split(), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("kind", "depths"), [
    ("yolov12", []), ("yolov12", ["--at", "2", "--deep", "TTFFFFFF"]), ("rtdetr", ["--deep", "FFFFF|3"]),
    ("rtdetr", ["--at", "1", "--deep", "TFFFF|3"]), ("dyyolov7", [])])
def test_command_of_detectors(kind: str, depths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Average precision of the router, of chance and of single depths, from one pass over the images."""
    assert main(["scenes", str(tmp_path), "--images", "40", "--val-images", "6", "--size", "64"]) == 0
    net, routed, table = tmp_path / "net.safetensors", tmp_path / "routed.safetensors", tmp_path / "gains.csv"
    torch.manual_seed(0)
    adn.save(randomise(DETECTORS[kind][0](classes=10)).eval(), net, extra={"data": {"size": 64}})

    def planted_savings(*args: object) -> Seen:
        seen = collect(*args, progress=False)
        bright = seen.features[0][0].flatten(1).std(1).double()
        return seen._replace(losses=torch.stack([bright / bright.std(), 0 * bright], 1))

    monkeypatch.setattr("adn.cli.route.collect", planted_savings)
    options = ["--workers", "0", "--device", "cpu"]
    assert main(["route", "fit", str(net), str(tmp_path), "--split", "train", "--out", str(routed), "--epochs", "40",
                 "--lr", "0.01", *depths, *options]) == 0
    capsys.readouterr()
    assert main(["route", "eval", str(routed), str(tmp_path), "--split", "val", "--csv", str(table), "--plot",
                 str(tmp_path / "gains.png"), *options]) == 0
    assert f"single depths: {adn.depths(adn.load(net))[0]} " in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    found = [row for row in rows if row["kind"] == "router"]
    assert [row["share"] for row in found] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    single = {row["kind"]: row for row in rows if row["kind"] != "router"}
    again = adn.load(routed)
    for place, depth, macs in zip((0, -1), again.depths, again.macs(torch.rand(1, 3, 64, 64)), strict=True):
        assert found[place]["ap"] == found[place]["random"]
        assert float(found[place]["ap"]) == pytest.approx(float(single[f"depth {depth}"]["ap"]), abs=1e-4)
        assert float(found[place]["gmacs"]) == pytest.approx(macs / 1e9)
        assert macs / 1e9 > float(single[f"depth {depth}"]["gmacs"])


def test_precision_of_a_mixture() -> None:
    """Each image by its route: what a perfect and a blind detector find together."""
    class Data:
        file, categories = "-", [type("Category", (), {"id": 7})]

        def ground_truth(self, image_ids: list[int]) -> dict[str, object]:
            boxes = [{"id": i + 1, "image_id": i, "category_id": 7, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
                     for i in image_ids]
            return {"images": [{"id": i} for i in image_ids], "categories": [{"id": 7}], "annotations": boxes}

    nothing = {i: Detections(np.zeros((0, 6), dtype=np.float32)) for i in range(4)}
    all_of_them = {i: Detections(np.array([[0, 0, 9, 9, 0.9, 0]], dtype=np.float32)) for i in range(4)}
    outcomes = Boxes(Data(), nothing, all_of_them)
    assert outcomes.of(np.zeros(4, dtype=bool)) == outcomes.at_random(0) == 0
    assert outcomes.of(np.ones(4, dtype=bool)) == outcomes.at_random(4) == pytest.approx(100)
    half = outcomes.of(np.array([True, False, True, False]))
    assert 45 < half < 55
    assert outcomes.at_random(2) == pytest.approx(half)
    assert outcomes.at_best(2) is None
