"""The commands for detectors: what they print and write is what the functions give, and what they refuse."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import randomise
from PIL import Image
from test_coco import COCO_MINI
from test_rtdetr import TINY
from torch import nn
from torch.utils.data import DataLoader

import adn
from adn.cli import main
from adn.cli.detect import coco_names
from adn.data.coco import collate, open_coco, read_class_names
from adn.data.scenes import write_scenes
from adn.data.transforms import eval_transform
from adn.detect.draw import label_colour
from adn.measure.average_precision import DetectionRow, evaluate_detector
from adn.measure.cost import count_macs
from adn.measure.profile import Point, Profile, profile
from adn.models.registry import ENTRIES
from adn.models.rtdetr import presets as rtdetr_presets
from adn.models.rtdetr.postprocess import postprocess
from adn.tasks import is_detector

SIZE = 96
CHAIN = ["FFFFF|3", "TFFFF|3", "TTFFF|3", "TTTFF|3", "TTTTF|3", "TTTTT|3", "TTTTT|2"]


def source(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    kwargs = TINY | {"num_classes": num_classes, "backbone_args": {"width": 8}}
    model = randomise(adn.create_model("rtdetr_r18vd", **kwargs))
    with torch.no_grad():
        for head in model.decoder.dec_score_head:
            head.bias.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return adn.convert(source())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "adn[demo]"')
    return write_scenes(tmp_path_factory.mktemp("data") / "digits", 1, 5, size=80, progress=False)


@pytest.fixture(scope="module")
def checkpoint(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    adn.save(net, path, class_names=list("0123456789"), extra={"data": {"size": SIZE}})
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "classifier.safetensors"
    adn.save(adn.create_model("anydepth_resnet18", num_classes=3), path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(((120, 80), (64, 100))):
        picture = Image.effect_noise(size, 90).convert("RGB")
        picture.paste((200, 20 * i, 90), (10, 10, 40, 40))
        picture.save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def adn_command(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs a command on the CPU: exit status, what it printed, what it reported."""
    def run(*args: object) -> tuple[int, str, str]:
        code = main([*map(str, args), *(["--device", "cpu"] if args[0] != "scenes" else [])])
        return code, *capsys.readouterr()

    return run


def found_by(net: nn.Module, path: Path, depth: str, size: int = SIZE) -> dict[str, torch.Tensor]:
    """Without the command's code."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.resize((size, size), Image.Resampling.BILINEAR).tobytes()),
                              dtype=torch.uint8).view(size, size, 3)
    with torch.inference_mode(), adn.at_depth(net.eval(), depth):
        (result,) = postprocess(net(pixels.permute(2, 0, 1)[None] / 255), [image.size])
    width, height = image.size
    result["boxes"] = result["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return result


def same(objects: list[dict], result: dict[str, torch.Tensor]) -> None:
    count = len(objects)
    torch.testing.assert_close(torch.tensor([o["score"] for o in objects]), result["scores"][:count])
    assert [o["label"] for o in objects] == result["labels"][:count].tolist()
    torch.testing.assert_close(torch.tensor([o["box"] for o in objects]), result["boxes"][:count], rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ detect


def test_detect(net: nn.Module, checkpoint: Path, pictures: Path, tmp_path: Path, adn_command) -> None:
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    alone = tmp_path / "alone.png"
    Image.open(pictures / "0.png").rotate(180).save(alone)
    shown = {}
    for depth in ("TTTTT|2", "super"):
        result = found_by(net, alone, depth)
        threshold = float(result["scores"][4:6].mean())
        code, out, err = adn_command("detect", alone, pictures, "--checkpoint", checkpoint, "--depth", depth,
                                     "--threshold", threshold, "--out", tmp_path / "drawn", "--json",
                                     tmp_path / "found.json")
        assert (code, "never trained as an any-depth net" in err) == (0, depth != "super")
        content = json.loads((tmp_path / "found.json").read_text())
        assert content["depth"] == ("FFFFF|3" if depth == "super" else depth)
        images = [alone, pictures / "0.png", pictures / "1.png"]
        assert [entry["image"] for entry in content["images"]] == list(map(str, images))
        assert [line for line in out.splitlines() if not line.startswith(" ")] == list(map(str, images))
        for path, entry in zip(images, content["images"], strict=True):
            expected = found_by(net, path, depth)
            assert len(entry["objects"]) == (expected["scores"] >= threshold).sum()
            same(entry["objects"], expected)
            assert all(o["name"] == "0123456789"[o["label"]] for o in entry["objects"])
            with Image.open(path) as picture, Image.open(tmp_path / "drawn" / f"{path.stem}.jpg") as drawn:
                assert drawn.size == picture.size == (entry["width"], entry["height"])
        lines = out.splitlines()
        assert lines[1:6] == [
            f"  {o['score']:6.1%}  {o['name']}  " + "  ".join(f"{edge:7.1f}" for edge in o["box"])
            for o in content["images"][0]["objects"]]
        shown[depth] = lines[1:6]
        with Image.open(tmp_path / "drawn" / "alone.jpg") as drawn:
            best = content["images"][0]["objects"][0]
            _, y0, x1, y1 = best["box"]
            edge = drawn.getpixel((min(round(x1), drawn.width - 1), round((y0 + y1) / 2)))
            assert max(abs(a - b) for a, b in zip(edge, label_colour(best["label"]), strict=True)) < 90
    assert shown["super"] != shown["TTTTT|2"]
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


def test_detect_runs_at_the_stored_depth_and_the_size_asked_for(
    net: nn.Module, pictures: Path, tmp_path: Path, adn_command
) -> None:
    path = tmp_path / "n.safetensors"
    with adn.at_depth(net, "TFTFF|2"):
        adn.save(net, path)
    common = ("detect", pictures / "0.png", "--checkpoint", path, "--threshold", 0, "--json", tmp_path / "f.json")
    for size, options in ((640, ()), (64, ("--size", 64))):
        assert adn_command(*common, *options)[0] == 0
        content = json.loads((tmp_path / "f.json").read_text())
        assert content["depth"] == "TFTFF|2"
        assert len(content["images"][0]["objects"]) == 200
        assert content["images"][0]["objects"][0]["name"].startswith("class ")
        same(content["images"][0]["objects"][:5], found_by(net, pictures / "0.png", "TFTFF|2", size))
    code, out, _ = adn_command("detect", pictures / "0.png", "--checkpoint", path, "--threshold", 1)
    assert (code, out.splitlines()[1:]) == (0, ["  nothing with a score of 1 or more"])


def test_detect_sees_pictures_upright(checkpoint: Path, pictures: Path, tmp_path: Path, adn_command) -> None:
    with Image.open(pictures / "0.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned clockwise
        image.save(tmp_path / "turned.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    found = []
    for name in ("turned", "upright"):
        adn_command("detect", tmp_path / f"{name}.png", "--checkpoint", checkpoint, "--threshold", 0, "--out",
                    tmp_path / "drawn", "--json", tmp_path / "f.json")
        found.append(json.loads((tmp_path / "f.json").read_text())["images"][0] | {"image": ""})
        with Image.open(tmp_path / "drawn" / f"{name}.jpg") as drawn:
            assert drawn.size == (80, 120)
    assert found[0] == found[1]


def test_detect_goes_on_after_an_unreadable_image(checkpoint: Path, pictures: Path, tmp_path: Path, adn_command
                                                  ) -> None:
    (pictures / "00.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    code, out, err = adn_command("detect", tmp_path / "none.jpg", pictures, "--checkpoint", checkpoint, "--out",
                                 tmp_path / "drawn", "--json", tmp_path / "f.json")
    assert code == 1
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        str(tmp_path / "none.jpg"), str(pictures / "00.png")]
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        str(pictures / "0.png"), str(pictures / "1.png")]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.jpg", "1.jpg"]
    assert len(json.loads((tmp_path / "f.json").read_text())["images"]) == 2


def test_detect_never_replaces_an_image(checkpoint: Path, pictures: Path, tmp_path: Path, adn_command) -> None:
    photo = pictures / "photo.jpg"
    Image.open(pictures / "0.png").save(photo)
    before = photo.read_bytes()
    (tmp_path / "link").symlink_to(pictures)
    for options in (("--out", pictures), ("--out", tmp_path / "link"), ("--json", photo)):
        code, out, err = adn_command("detect", photo, "--checkpoint", checkpoint, *options)
        assert (code, out) == (2, "")
        assert "photo.jpg is one of the images, and would be overwritten" in err
    assert photo.read_bytes() == before
    assert adn_command("detect", pictures / "0.png", "--checkpoint", checkpoint, "--out", pictures)[0] == 0
    assert (pictures / "0.jpg").is_file(), "another name is no harm"


def test_detect_draws_images_of_one_name_under_several(checkpoint: Path, pictures: Path, tmp_path: Path, adn_command
                                                       ) -> None:
    others = [tmp_path / "a" / "0.png", tmp_path / "b" / "0.gif", tmp_path / "0-2.png"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 40 + len(str(path))), 90).save(path)
    adn_command("detect", pictures / "0.png", *others, "--checkpoint", checkpoint, "--out", tmp_path / "drawn")
    drawn = [tmp_path / "drawn" / name for name in ("0.jpg", "0-2.jpg", "0-3.jpg", "0-2-2.jpg")]
    assert sorted((tmp_path / "drawn").iterdir()) == sorted(drawn)
    for path, image in zip([pictures / "0.png", *others], drawn, strict=True):
        assert Image.open(path).size == Image.open(image).size


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models by name: of one depth, any-depth, and of COCO's classes."""
    kwargs = {"backbone": "presnet18", "expansion": 0.5, "decoder_layers": 3, **TINY, "backbone_args": {"width": 8}}
    del kwargs["num_classes"]
    monkeypatch.setitem(ENTRIES, "tiny", rtdetr_presets.entry(kwargs))
    monkeypatch.setitem(ENTRIES, "anydepth_tiny", rtdetr_presets.entry(kwargs, any_depth=True))


@pytest.mark.usefixtures("presets")
@pytest.mark.parametrize(("name", "classes"), [("tiny", 10), ("anydepth_tiny", 10), ("tiny", 80)])
def test_detect_with_the_weights_of_others(name: str, classes: int, pictures: Path, tmp_path: Path, adn_command
                                           ) -> None:
    """Plain weights, averaged ones as training scripts store them, for a model that is to run at any depth."""
    model = source(classes)
    torch.save({"ema": {"module": model.state_dict()}}, tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    net = adn.convert(model)
    for depth in ("super", "TTTTT|2"):
        options = ("--classes", tmp_path / "names.txt") if classes == 10 else ()
        code, _, err = adn_command("detect", pictures / "0.png", "--model", name, "--weights", tmp_path / "weights.pth",
                                   "--depth", depth, "--threshold", 0, "--size", SIZE, *options, "--json",
                                   tmp_path / "f.json")
        assert code == 0, err
        objects = json.loads((tmp_path / "f.json").read_text())["images"][0]["objects"]
        same(objects[:5], found_by(net, pictures / "0.png", depth))
        names = {o["label"]: o["name"] for o in objects}
        known = [f"digit {i}" for i in range(10)] if classes == 10 else coco_names()
        assert names == {label: known[label] for label in names}


def test_names_of_coco() -> None:
    """By label, which is the place among the ids that are in use."""
    names = coco_names()
    assert len(names) == 80
    assert {i: names[i] for i in (0, 10, 11, 12, 26, 79)} == {
        0: "person", 10: "fire hydrant", 11: "stop sign", 12: "parking meter", 26: "handbag", 79: "toothbrush"}
    if COCO_MINI.is_dir():
        assert names == read_class_names(COCO_MINI / "instances_val.json")


def test_class_names_of_a_file(tmp_path: Path, scenes: Path) -> None:
    assert read_class_names(scenes / "instances_val.json") == list("0123456789")
    (tmp_path / "names.txt").write_text("traffic light\n\n dog \n", encoding="utf-8")
    assert read_class_names(tmp_path / "names.txt") == ["traffic light", "dog"]
    (tmp_path / "names.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match="COCO's instances format"):
        read_class_names(tmp_path / "names.json")
    with pytest.raises(ValueError, match=r"no class names in .*nowhere.txt"):
        read_class_names(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(("options", "message"), [
    (["--depth", "TTTT"], "depth 'TTTT' has 4 flags"),
    (["--threshold", "1.5"], "--threshold 1.5; pass a score from 0 to 1"),
    (["--size", "100"], "multiples of 32"),
    (["--size", "0"], "multiples of 32"),
    (["--weights", "w.pth"], "--weights are for a detector of --model"),
    (["--classes", "three.txt"], "three.txt names 3 classes, the net has 10"),
])
def test_detect_refuses(options: list[str], message: str, checkpoint: Path, pictures: Path, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch, adn_command) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.txt").write_text("a\nb\nc\n")
    code, out, err = adn_command("detect", pictures, "--checkpoint", checkpoint, *options)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.usefixtures("presets")
def test_models_and_weights_that_do_not_go_together(pictures: Path, tmp_path: Path, adn_command) -> None:
    torch.save(source(80).state_dict(), tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "empty").mkdir()
    for command, options, message in (
        (pictures, ("--model", "tiny"), "--model tiny alone has random weights: pass --weights"),
        (pictures, ("--model", "resnet50", "--weights", tmp_path / "w.pth"), "no detector 'resnet50'"),
        (pictures, ("--model", "tiny", "--weights", tmp_path / "w.pth", "--classes", tmp_path / "names.txt"),
         "(80, 32) given, (2, 32) in the net"),
        (tmp_path / "empty", ("--model", "tiny", "--weights", tmp_path / "w.pth"), "no image in the folder"),
    ):
        code, out, err = adn_command("detect", command, *options)
        assert (code, out) == (2, "")
        assert message in err


# -------------------------------------------------------------------------------------------------------------- eval


def test_eval(net: nn.Module, checkpoint: Path, scenes: Path, tmp_path: Path, adn_command) -> None:
    pytest.importorskip("pycocotools")
    code, out, err = adn_command("eval", scenes, "--checkpoint", checkpoint, "--workers", 0, "--csv",
                                 tmp_path / "accuracy.csv", "--results-dir", tmp_path / "results")
    assert code == 0
    assert "never trained as an any-depth net" in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["depth", *CHAIN, "5", "7"]
    assert lines[0].split()[1:] == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "GMACs"]
    assert lines[8:] == ["5 images", "7 of 96 depths; --depth all measures every one"]
    data = open_coco(scenes, "val", eval_transform(SIZE))
    expected = evaluate_detector(net, DataLoader(data, 8, collate_fn=collate), CHAIN)
    macs = count_macs(net, torch.rand(1, 3, SIZE, SIZE), CHAIN, norms=True)
    text = (tmp_path / "accuracy.csv").read_text().splitlines()
    assert text[0] == "depth,macs,ap,ap50,ap75,aps,apm,apl,ar100,images"
    for line, row, count in zip(csv.reader(text[1:]), expected, macs, strict=True):
        numbers = (row.ap, row.ap50, row.ap75, row.aps, row.apm, row.apl, row.ar100)
        assert line == [str(row.depth), str(count), *("" if n is None else str(n) for n in numbers), "5"]
    assert any(row.ar100 > 0 for row in expected), "else nothing was compared"
    assert len(list((tmp_path / "results").iterdir())) == 7


def test_eval_of_chosen_depths_with_latency(checkpoint: Path, scenes: Path, tmp_path: Path, adn_command) -> None:
    pytest.importorskip("pycocotools")
    broken = tmp_path / "digits"
    for name in ("instances_train.json", "images/train/000001.jpg"):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.loads((scenes / "instances_train.json").read_text())
        content["images"] += [{"id": 7, "file_name": "absent.jpg", "width": 80, "height": 80}]
        content["annotations"] += [{"id": 999, "image_id": 1, "category_id": 1, "bbox": [90, 90, 5, 5]}]
        (broken / name).write_text(json.dumps(content))
    (broken / name).write_bytes((scenes / name).read_bytes())
    code, out, err = adn_command(
        "eval", broken, "--checkpoint", checkpoint, "--workers", 0, "--split", "train", "--depth", "super,TFTFF|1",
        "--latency", "--size", 64, "--batch-size", 1, "--amp", "bf16", "--csv", tmp_path / "a.csv")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["depth", "FFFFF|3", "TFTFF|1", "1"]
    assert out.splitlines()[0].endswith(" ms")
    assert "boxes without area in their image, which are not trained on: 1" in err
    assert "1 of 2 images could not be read" in err
    assert "absent.jpg" in err
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    assert int(rows[0]["macs"]) > int(rows[1]["macs"])


@pytest.mark.usefixtures("presets")
def test_eval_of_the_weights_of_others(scenes: Path, tmp_path: Path, adn_command) -> None:
    """A model of one depth was trained at that one: the others are shown only if asked for."""
    pytest.importorskip("pycocotools")
    torch.save(source().state_dict(), tmp_path / "w.pth")
    for name, depths in (("tiny", ["FFFFF|3"]), ("anydepth_tiny", CHAIN)):
        code, out, err = adn_command("eval", scenes, "--model", name, "--weights", tmp_path / "w.pth", "--size", 64,
                                     "--workers", 0)
        assert code == 0, err
        assert [line.split()[0] for line in out.splitlines()[1:]] == [*depths, "5", str(len(depths))]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_decoder_too_short_to_cut(layers: int, scenes: Path, tmp_path: Path, adn_command) -> None:
    pytest.importorskip("pycocotools")
    kwargs = TINY | {"num_classes": 10, "backbone_args": {"width": 8}, "decoder_layers": layers}
    net = adn.convert(adn.create_model("rtdetr_r18vd", **kwargs))
    adn.save(net, tmp_path / "net.safetensors", class_names=list("0123456789"))
    code, out, err = adn_command("eval", scenes, "--checkpoint", tmp_path / "net.safetensors", "--size", 64,
                                 "--workers", 0, "--csv", tmp_path / "a" / "b.csv")
    assert code == 0, err
    depths = [f"{'T' * i}{'F' * (5 - i)}|{layers}" for i in range(6)]
    assert [line.split()[0] for line in out.splitlines()[1:7]] == depths
    with open(tmp_path / "a" / "b.csv", newline="") as file:  # whose folder was made
        assert [row["depth"] for row in csv.DictReader(file)] == depths


def test_no_accuracy_in_a_file(checkpoint: Path, tmp_path: Path, adn_command) -> None:
    (tmp_path / "a.csv").write_text("depth,ap\nFFFFF|3,\n")
    code, _, err = adn_command("profile", "--task", "detect", "--checkpoint", checkpoint, "--accuracy",
                               tmp_path / "a.csv")
    assert code == 2
    assert "a.csv has no accuracy in it: its column ap is empty" in err


def test_options_of_the_other_kind(checkpoint: Path, classifier: Path, scenes: Path, adn_command) -> None:
    for path, options, message in (
        (checkpoint, ("--resize", 70), "holds a detector, which has no use for --resize"),
        (checkpoint, ("--class-map", "m"), "no use for --class-map"),
        (checkpoint, ("--split", "test"), "no COCO split 'test'"),
        (classifier, ("--latency",), "holds a classifier, which has no use for --latency"),
        (classifier, ("--results-dir", "r"), "no use for --results-dir"),
        (classifier, ("--weights", "w"), "--weights are for a detector"),
        (classifier, ("--task", "detect"), "classifier.safetensors is made to classify"),
        (checkpoint, ("--task", "classify"), "net.safetensors is made to detect"),
    ):
        code, out, err = adn_command("eval", scenes, "--checkpoint", path, *options)
        assert (code, out) == (2, "")
        assert message in err


def test_what_is_missing_is_named(checkpoint: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, adn_command
                                  ) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, err = adn_command("eval", scenes, "--checkpoint", checkpoint)
    assert code == 2
    assert 'pip install "adn[detect]"' in err


@pytest.mark.parametrize("command", ["predict", "calibrate"])
def test_commands_for_classifiers_name_those_for_detectors(command: str, checkpoint: Path, pictures: Path,
                                                           tmp_path: Path, adn_command) -> None:
    options = ("--depth", "super", "--out", tmp_path / "n.safetensors") if command == "calibrate" else ()
    code, out, err = adn_command(command, pictures / "0.png", "--checkpoint", checkpoint, *options)
    assert (code, out) == (2, "")
    assert "holds a detector" in err
    assert "adn detect" in err


def test_detect_names_the_command_for_classifiers(classifier: Path, pictures: Path, adn_command) -> None:
    code, out, err = adn_command("detect", pictures / "0.png", "--checkpoint", classifier)
    assert (code, out) == (2, "")
    assert "adn predict" in err


# ----------------------------------------------------------------------------------------------------------- profile


def test_profile_of_a_checkpoint(net: nn.Module, checkpoint: Path, tmp_path: Path, adn_command) -> None:
    code, out, err = adn_command("profile", "--checkpoint", checkpoint, "--rounds", 1, "--budget", 1e6, "--csv",
                                 tmp_path / "p.csv")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:8]] == ["depth", *CHAIN]
    assert "AP" not in lines[0]
    assert f"input 3x{SIZE}x{SIZE}" in lines[8]
    assert lines[9:] == ["7 of 96 depths; --depth all measures every one", "FFFFF|3 fits 1e+06 ms (p50)"]
    macs = count_macs(net, torch.rand(1, 3, SIZE, SIZE), CHAIN, norms=True)
    assert [point.macs for point in Profile.from_csv(tmp_path / "p.csv")] == macs


def test_profile_with_accuracy(checkpoint: Path, tmp_path: Path, adn_command) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.csv").write_text("depth,macs,ap,ap50\nTTTTT|2,1,40.5,60\nFFFFF|3,2,43.25,62\nTTTTT|3,2,,62\n")
    code, out, err = adn_command("profile", "--checkpoint", checkpoint, "--rounds", 1, "--accuracy", tmp_path / "a.csv",
                                 "--csv", tmp_path / "p.csv", "--plot", tmp_path / "p.svg", "--size", 64)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["depth", "TTTTT|2", "FFFFF|3"]
    assert lines[0].split()[-2:] == ["AP", "Pareto"]
    assert "43.25" in lines[2]
    assert (tmp_path / "p.csv").read_text().splitlines()[-3] == "depth,macs,params,p50_ms,p99_ms,ap"
    result = Profile.from_csv(tmp_path / "p.csv")
    assert result.metric == "ap"
    assert {str(point.depth): point.top1 for point in result} == {"TTTTT|2": 40.5, "FFFFF|3": 43.25}
    assert b"<!-- AP (%) -->" in (tmp_path / "p.svg").read_bytes()
    (tmp_path / "a.csv").write_text("depth,macs,top1\nFFFFF|3,1,50.5\n")
    code, _, err = adn_command("profile", "--task", "detect", "--checkpoint", checkpoint, "--accuracy",
                               tmp_path / "a.csv")
    assert code == 2
    assert "no column 'ap'" in err


@pytest.mark.usefixtures("presets")
@pytest.mark.parametrize("name", ["tiny", "anydepth_tiny"])
def test_profile_of_a_model(name: str, adn_command) -> None:
    code, out, err = adn_command("profile", "--model", name, "--size", 64, "--depth", "super,TTTTT|1", "--rounds", 1)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["FFFFF|3", "TTTTT|1"]


def test_profile_joins_rows_of_detectors_and_reads_older_files(net: nn.Module, tmp_path: Path) -> None:
    rows = [DetectionRow(adn.Depth(depth), ap, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 5)
            for depth, ap in (("TTTTT|2", 40.0), ("FFFFF|3", None))]
    result = profile(net, torch.rand(1, 3, 64, 64), depths=[row.depth for row in rows], rounds=1, accuracy=rows)
    assert result.metric == "ap"
    assert [point.top1 for point in result] == [40.0, None]
    (tmp_path / "old.csv").write_text("# adn: 0.1.0\ndepth,macs,params,p50_ms,p99_ms,top1\nTF,2,3,1.0,2.0,71.5\n")
    old = Profile.from_csv(tmp_path / "old.csv")
    assert (old.metric, old[0].top1) == ("top1", 71.5)


def test_figure_leads_along_stages_then_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn = {}
    plot = axes.Axes.plot

    def remember(self, *args, **kwargs):
        drawn[kwargs["label"]] = args[0]
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(axes.Axes, "plot", remember)
    depths = adn.Depth.every(adn.Depth("FF|3"))[::-1]
    times = {str(depth): 10.0 - 3 * sum(depth.flags) + depth.layers[0] for depth in depths}
    Profile([Point(depth, 1, 1, times[str(depth)], 9.0) for depth in depths]).plot(tmp_path / "p.png")
    assert drawn["one stage less each time"] == [times[d] for d in ("FF|3", "TF|3", "TT|3", "TT|2", "TT|1")]


# ------------------------------------------------------------------------------------------------------- is_detector


def test_is_detector(net: nn.Module) -> None:
    assert is_detector(net)
    assert is_detector(torch.compile(net, backend="eager"))
    assert is_detector(source())
    assert not is_detector(adn.create_model("anydepth_resnet18", num_classes=3))
    assert not is_detector(nn.Linear(2, 2))
