from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import adn
from adn.cli import main
from adn.demo import digits as demo
from adn.demo import routes, scenes
from adn.tasks import is_detector

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_held_out_digits_are_held_out() -> None:
    digits = demo.Digits.load()
    assert (len(digits.x), len(digits.held_out_x)) == (1437, 360)
    training = {image.numpy().tobytes() for image in digits.x}
    assert not any(image.numpy().tobytes() in training for image in digits.held_out_x)
    torch.manual_seed(0)
    torch.testing.assert_close(demo.Digits.load().held_out_x, digits.held_out_x, rtol=0, atol=0)
    assert all((digits.held_out_y == digit).sum() > 20 for digit in range(10))


def test_batches_are_shifted_digits() -> None:
    digits = demo.Digits.load()
    torch.manual_seed(0)
    batches = list(digits.batches(0))
    assert len(batches) == 1437 // demo.RECIPE.batch_size
    for x, y in batches[:3]:
        assert x.shape == (demo.RECIPE.batch_size, 3, demo.SIZE, demo.SIZE)
        assert y.shape == (demo.RECIPE.batch_size,)
        for image, label in zip(x[:4], y, strict=False):
            # Only pixels pushed over the edge may be lost: the same digit must be among the unshifted ones.
            inner = image[:, 8:-8, 8:-8]
            found = any(torch.equal(inner, original[:, 8 + i : 24 + i, 8 + j : 24 + j])
                        for original in digits.x[digits.y == label]
                        for i in range(-4, 5) for j in range(-4, 5))
            assert found


def test_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out, whole = tmp_path / "demo", demo.Digits.load()
    few = dataclasses.replace(whole, x=whole.x[:160], y=whole.y[:160])
    monkeypatch.setattr(demo.Digits, "load", lambda: few)
    assert main(["demo", "--out", str(out), "--epochs", "1", "--compare"]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("depth  MMACs"):].splitlines()[1:17]
    net = adn.load(out / "model.safetensors").eval()
    assert [line.split()[0] for line in table] == [str(depth) for depth in adn.depths(net)]
    assert "trained separately" in printed
    assert (out / "depths.png").stat().st_size > 10_000

    profile, digits = adn.Profile.from_csv(out / "depths.csv"), few
    checkpoint = ["--checkpoint", str(out / "model.safetensors")]
    assert main(["profile", *checkpoint, "--rounds", "1", "--budget", "10000"]) == 0
    assert "FFFF fits 10000 ms" in capsys.readouterr().out
    # A picture of a held-out digit, as a user would have it, is prepared as the digits were.
    grey = (digits.held_out_x[0, 0] * digits.std + digits.mean).mul(255).round().byte().numpy()
    Image.fromarray(grey).save(tmp_path / "digit.png")
    assert main(["predict", str(tmp_path / "digit.png"), *checkpoint, "--depth", "TTFF", "--top", "1"]) == 0
    with torch.inference_mode(), adn.at_depth(net, "TTFF"):
        expected = net(digits.held_out_x[:1]).softmax(1).max(1)
    share, label = capsys.readouterr().out.split()[-2:]
    assert int(label) == expected.indices.item()
    assert float(share.rstrip("%")) == pytest.approx(100 * expected.values.item(), abs=2)
    for row, point in zip(adn.evaluate(net, digits.held_out()), profile, strict=True):
        assert (row.depth, row.top1) == (point.depth, pytest.approx(point.top1))

    again = demo.run(tmp_path / "again", epochs=1, progress=False)
    assert [p.top1 for p in again.profile] == [p.top1 for p in profile], "the same numbers for the same seed"


def test_a_user_finds_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(scenes, "IMAGES", 16)
    monkeypatch.setattr(scenes, "HELD_OUT", 4)
    monkeypatch.setattr(scenes, "ROUNDS", 2)
    out = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", "--task", "detect", "--out", str(out), "--epochs", "1"]) == 0
        printed = capsys.readouterr().out
    table = printed[printed.index("\ndepth ") + 1 :].splitlines()[1:10]
    assert [line.split()[0] for line in table] == ["T" * i + "F" * (8 - i) for i in range(9)]
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 2 * 3 * scenes.RECIPE.size
        assert picture.height > 3 * 3 * scenes.RECIPE.size
    assert (out / "depths.png").stat().st_size > 10_000
    net = adn.load(out / "model.safetensors")
    assert is_detector(net)
    command = next(line for line in printed.splitlines() if line.startswith("next:")).split()[2:]
    assert main([*command, "--rounds", "1"]) in (0, 1)
    assert main(["detect", str(out / "scenes" / "images" / "val"), "--checkpoint", str(out / "model.safetensors"),
                 "--out", str(tmp_path / "found"), "--depth", "TFTFTFTF"]) == 0


def test_another_run_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"recipe": {}}')
    (tmp_path / "last.pt").write_text("somebody's training")
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_text() == "somebody's training"


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 2
    assert 'pip install "adn[demo]"' in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_every_depth_is_right(seed: int, tmp_path: Path) -> None:
    result = demo.run(tmp_path, seed=seed, progress=False)
    assert len(result.profile) == 16
    assert min(point.top1 for point in result.profile) >= 95


def test_clutter_is_on_half_of_them() -> None:
    x = demo.Digits.load().x[:400]
    found, hard = routes.clutter(x, torch.Generator().manual_seed(0))
    assert 160 < hard.sum() < 240
    assert torch.equal(found[~hard], x[~hard])
    assert (found[hard] != x[hard]).flatten(1).any(1).all()
    assert all(torch.equal(a, b) for a, b in zip(routes.clutter(x, torch.Generator().manual_seed(0)), (found, hard),
                                                 strict=True))


def test_a_user_sees_what_runs_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                    ) -> None:
    out, whole = tmp_path / "demo", demo.Digits.load()
    few = dataclasses.replace(whole, x=whole.x[:160], y=whole.y[:160], held_out_x=whole.held_out_x[:60],
                              held_out_y=whole.held_out_y[:60])
    monkeypatch.setattr(demo.Digits, "load", lambda: few)
    monkeypatch.setattr(routes, "FOR_ROUTER", 60)
    assert main(["demo", "--task", "route", "--out", str(out), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "at FFFF, the others at TTTT" in printed
    for name in ("routing.png", "routes.png"):
        with Image.open(out / name) as figure:
            assert figure.size[0] > 500
    lines = (out / "routing.csv").read_text().splitlines()
    assert sum(line.startswith("router,") for line in lines) == 11
    assert sum(line.startswith("depth ") for line in lines) == 16
    routed = adn.load(out / "routed.safetensors")
    with torch.inference_mode():
        assert routed(few.held_out_x).shape == (60, 10)
    assert main(["route", "threshold", str(out / "routed.safetensors"), "--share", "0.3"]) == 0, "what it says is next"
    with pytest.raises(SystemExit):
        main(["demo", "--task", "sing"])
    assert main(["demo", "--task", "route", "--compare", "--out", str(out)]) == 2
    assert "leave it out" in capsys.readouterr().err
