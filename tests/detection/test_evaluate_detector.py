"""Average precision at every depth: against the COCO tools called directly, and on what is hard for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import build, in_two_processes
from PIL import Image
from test_coco import COCO_MINI
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.ops import box_convert

import adn
from adn.core.depth import Depth
from adn.data.coco import CocoImages, collate, open_coco
from adn.data.transforms import eval_transform
from adn.measure.average_precision import (
    BACKENDS,
    DetectionRow,
    Detections,
    detection_table,
    evaluate_detector,
    require_backend,
    score,
    to_results,
)
from adn.models.rtdetr.postprocess import postprocess

pytest.importorskip("pycocotools", reason='needs pycocotools: pip install "adn[detect]"')

IDS, STEP = (2, 5, 11), 12  # category ids; grey levels from one picture to the next


def write(folder: Path, images: int = 12, seed: int = 0, crowds: float = 0.15) -> CocoImages:
    """Pictures that tell by their grey level which they are; small, medium and large objects, some of them crowds."""
    rng = np.random.default_rng(seed)
    described: dict[str, Any] = {"images": [], "annotations": [], "categories": [
        {"id": i, "name": f"c{i}"} for i in IDS]}
    for i in range(images):
        width, height = (int(v) for v in rng.integers(200, 300, 2))
        name = f"{i}.png"
        Image.new("RGB", (width, height), (STEP * i,) * 3).save(folder / name)
        described["images"].append({"id": 100 - 3 * i, "file_name": name, "width": width, "height": height})
        for _ in range(rng.integers(9)):
            w, h = (float(v) for v in np.exp(rng.uniform(np.log(8), np.log(180), 2)))
            box = [float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h]
            described["annotations"].append({
                "id": len(described["annotations"]) + 1, "image_id": 100 - 3 * i, "bbox": box,
                "category_id": int(rng.choice(IDS)), "area": w * h * float(rng.uniform(0.4, 1)),
                "iscrowd": int(rng.random() < crowds)})
    (folder / "truth.json").write_text(json.dumps(described))
    return CocoImages(folder, folder / "truth.json", eval_transform(32))


class Oracle(nn.Module):
    """A detector that knows the picture by its grey level and finds its objects the worse, the shallower it runs.

    The net inside makes it any-depth; without one, it has one depth.
    """

    QUERIES = 30

    def __init__(self, data: CocoImages, noise: float = 0.02, module: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.data, self.noise, self.num_classes = data, noise, len(data.class_names)
        if module is not None:
            self.module = module
        self.seen: list[tuple[torch.dtype, bool, int]] = []

    def find(self, index: int, flags: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * index + flags)
        target = self.data[index][1]
        logits = torch.randn(self.QUERIES, self.num_classes, generator=generator) * 2 - 3
        boxes = torch.rand(self.QUERIES, 4, generator=generator) * 0.5 + 0.25
        n = len(target["labels"])
        noise = torch.randn(n, 4, generator=generator) * self.noise * (1 + flags)
        boxes[:n] = (target["boxes"] * (1 + noise)).clamp(0, 1)
        logits[range(n), target["labels"]] += 5
        return logits, boxes

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append((images.dtype, self.training, len(images)))
        flags = sum(adn.get_depth(self)) if hasattr(self, "module") else 0
        found = [self.find(round(255 * float(image.mean()) / STEP), flags) for image in images]
        logits, boxes = (torch.stack(part).to(images) for part in zip(*found, strict=True))
        return {"pred_logits": logits, "pred_boxes": boxes}

    def postprocess(self, outputs: dict[str, torch.Tensor], sizes: Sequence) -> list[dict[str, torch.Tensor]]:
        return postprocess(outputs, sizes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return adn.convert(build("resnet18", num_classes=3))


def batches(data: Any, size: int = 5) -> DataLoader:
    return DataLoader(data, size, collate_fn=collate)


def directly(data: CocoImages, results: Path) -> list[float]:
    """What pycocotools makes of two files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(data.file)
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def test_rows_are_what_the_coco_tools_say_of_the_files(data: CocoImages, module: nn.Module, tmp_path: Path) -> None:
    net = Oracle(data, module=module)
    rows = evaluate_detector(net, batches(data), ["super", "TFFT", "base"], results_dir=tmp_path / "new" / "folder",
                             progress=False)
    assert [str(row.depth) for row in rows] == ["FFFF", "TFFT", "TTTT"]
    for row in rows:
        stats = directly(data, tmp_path / "new" / "folder" / f"results_{row.depth}.json")
        ours = [row.ap, row.ap50, row.ap75, row.aps, row.apm, row.apl, row.ar100]
        assert ours == [round(100 * value, 10) for value in (*stats[:6], stats[8])]
        assert row.images == 12
    assert rows[0].ap > rows[1].ap > rows[2].ap > 1
    assert rows[0].ap50 < 99


def test_results_are_the_detections_in_pixels_of_the_picture(data: CocoImages, tmp_path: Path) -> None:
    net = Oracle(data)
    evaluate_detector(net, batches(data), results_dir=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert len(results) == len(data) * Oracle.QUERIES * 3
    for index in range(len(data)):
        logits, boxes = net.find(index, 0)
        ours = [result for result in results if result["image_id"] == 100 - 3 * index]
        best, flat = logits.flatten().sort(descending=True)
        assert [result["category_id"] for result in ours] == [IDS[k % 3] for k in flat.tolist()]
        assert [result["score"] for result in ours] == pytest.approx(best.sigmoid().tolist())
        width, height = data[index][1]["size"].tolist()
        pixels = box_convert(boxes[flat // 3], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        xywh = box_convert(pixels, "xyxy", "xywh")
        torch.testing.assert_close(torch.tensor([result["bbox"] for result in ours]), xywh, rtol=0, atol=1e-3)


def test_a_plain_net_has_one_row_and_its_mode_comes_back(data: CocoImages) -> None:
    net = Oracle(data).train()
    net.add_module("frozen", nn.Dropout().eval())
    (row,) = evaluate_detector(net, batches(data))
    assert row.depth is None
    assert row.ap > 5
    assert net.training
    assert not net.frozen.training
    assert not any(training for _, training, _ in net.seen)
    with pytest.raises(ValueError, match="not any-depth: leave out depths="):
        evaluate_detector(net, batches(data), ["super"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no images at {COCO_MINI} (set ADN_COCO_MINI)")
def test_ground_truth_against_itself(split: str, backend: str) -> None:
    pytest.importorskip(backend)
    data = open_coco(COCO_MINI, split, eval_transform(32))

    class Truth(Oracle):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            logits, boxes = torch.full((len(images), 64, 80), -30.0), torch.full((len(images), 64, 4), 0.5)
            for k, image in enumerate(images):
                target = targets[image.double().mean().item()]
                n = len(target["labels"])
                logits[k, range(n), target["labels"]] = 9.0
                boxes[k, :n] = target["boxes"]
            return {"pred_logits": logits, "pred_boxes": boxes}

    targets = {image.double().mean().item(): target for image, target in data}
    assert len(targets) == len(data), "the mean tells which picture it is"
    (row,) = evaluate_detector(Truth(data), batches(data, 16), backend=backend)
    assert [row.ap, row.ap50, row.ap75, row.aps, row.apm, row.apl, row.ar100] == [100] * 7


@pytest.mark.parametrize("seed", range(4))
def test_the_faster_package_agrees_to_the_last_digit(tmp_path: Path, module: nn.Module, seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    data = write(tmp_path, images=20, seed=seed)
    for noise in (0.01, 0.05):
        both = [evaluate_detector(Oracle(data, noise, module), batches(data), ["super", "base"], backend=backend)
                for backend in BACKENDS]
        assert both[0] == both[1]
        assert both[0][0].aps is not None


def test_a_detection_in_a_crowd_is_no_mistake(tmp_path: Path) -> None:
    """One object found with the lower score, one detection within a crowd with the higher."""
    data = write(tmp_path, images=2, crowds=0)
    described = json.loads((tmp_path / "truth.json").read_text())
    described["annotations"] = [
        {"id": 1, "image_id": 100, "category_id": 5, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0},
        {"id": 2, "image_id": 100, "category_id": 5, "bbox": [80, 80, 100, 100], "area": 9000, "iscrowd": 1}]
    found = {100: Detections(np.array([[100, 100, 130, 130, 0.9, 1], [10, 10, 60, 60, 0.5, 1]], dtype=np.float32)),
             97: Detections(np.empty((0, 6), dtype=np.float32))}
    accuracies = []
    for crowd in (1, 0):
        described["annotations"][1]["iscrowd"] = crowd
        (tmp_path / "truth.json").write_text(json.dumps(described))
        data = CocoImages(tmp_path, tmp_path / "truth.json")
        accuracies.append(score(data, to_results(data, found), found))
    # Else: two objects, of which the second detection, at precision 1/2, finds one: 51 of 101 recalls.
    assert [a["ap"] for a in accuracies] == pytest.approx([100, 100 * 0.5 * 51 / 101])
    assert [a["ar100"] for a in accuracies] == pytest.approx([100, 50])


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_without_a_single_annotation(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    write(tmp_path, 3)
    described = json.loads((tmp_path / "truth.json").read_text())
    (tmp_path / "truth.json").write_text(json.dumps(described | {"annotations": []}))
    data = CocoImages(tmp_path, tmp_path / "truth.json", eval_transform(32))
    (row,) = evaluate_detector(Oracle(data), batches(data), backend=backend)
    assert row == DetectionRow(None, *[None] * 7, images=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_net_that_finds_nothing(data: CocoImages, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)

    class Blind(Oracle):
        QUERIES = 0

        def find(self, index: int, flags: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty(0, 3), torch.empty(0, 4)

    (row,) = evaluate_detector(Blind(data), batches(data), results_dir=tmp_path, backend=backend)
    assert [row.ap, row.ap50, row.ap75, row.aps, row.apm, row.apl, row.ar100] == [0] * 7
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_only_the_images_of_the_loader_count_and_each_once(data: CocoImages, tmp_path: Path) -> None:
    net = Oracle(data)
    few = evaluate_detector(net, batches(Subset(Subset(data, range(1, 9)), [1, 3, 4])))
    again = evaluate_detector(net, batches(Subset(data, [2, 4, 5, 4, 2]), 2))
    assert few == again
    assert few[0].images == 3
    described = json.loads(Path(data.file).read_text())
    described["images"] = [described["images"][i] for i in (2, 4, 5)]
    kept = [image["id"] for image in described["images"]]
    described["annotations"] = [a for a in described["annotations"] if a["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(described))
    assert few == evaluate_detector(net, batches(CocoImages(data.folder, tmp_path / "few.json", data.transform)))


def test_unreadable_images_do_not_count(tmp_path: Path) -> None:
    data = write(tmp_path, 6)
    net = Oracle(data)
    (tmp_path / "2.png").write_bytes(b"")
    (row,) = evaluate_detector(net, batches(data, 1))
    assert row.images == 5
    assert data.unreadable == [str(tmp_path / "2.png")]
    (whole,) = evaluate_detector(net, batches(Subset(data, [0, 1, 3, 4, 5])))
    assert row == whole


def test_nothing_is_printed(data: CocoImages, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_detector(Oracle(data), batches(data))
    assert capsys.readouterr() == ("", "")


class Broken(Oracle):
    def find(self, index: int, flags: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, boxes = super().find(index, flags)
        return logits, boxes * float("nan") if flags == 1 else boxes


def test_bad_input(data: CocoImages, module: nn.Module, tmp_path: Path) -> None:
    net = Oracle(data, module=module)
    with pytest.raises(ValueError, match="pass one of 'pycocotools', 'faster_coco_eval'"):
        evaluate_detector(net, batches(data), backend="coco")
    with pytest.raises(ValueError, match="pass a torch DataLoader over CocoImages"):
        evaluate_detector(net, list(batches(data)))
    with pytest.raises(ValueError, match=r"depth 'TT' has 2 flags"):
        evaluate_detector(net, batches(data), ["TT"])
    with pytest.raises(ValueError, match="the loader is empty"):
        evaluate_detector(net, batches(Subset(data, [])), ["super"])
    with pytest.raises(ValueError, match="not finite at depth FTFF"):
        evaluate_detector(Broken(data, module=module), batches(data), ["super", "FTFF"])
    other = Oracle(data, module=module)
    other.num_classes = 4
    with pytest.raises(ValueError, match=r"truth.json has 3 categories, the net 4 classes"):
        evaluate_detector(other, batches(data), ["super"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evaluate_detector(net, batches(data), ["super"], results_dir=tmp_path / "file")
    state = adn.core.state.state_of(module)
    state.class_names = ["c2", "cow", "c11"]
    try:
        with pytest.raises(ValueError, match=r"class 1 is 'c5' in .* and 'cow' in the net"):
            evaluate_detector(net, batches(data), ["super"])
    finally:
        state.class_names = None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, install in (("pycocotools", r"adn\[detect\]"), ("faster_coco_eval", "faster-coco-eval")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f'pip install "{install}"'):
            require_backend(name)


def test_table() -> None:
    row = DetectionRow(Depth("FTTTT|4"), 50.46, 68.2, 55.0, None, 54.8, 67.8, 70.04, 5000)
    assert detection_table([row]).splitlines() == [
        "depth      AP  AP50  AP75  APs   APm   APl  AR100",
        "FTTTT|4  50.5  68.2  55.0    -  54.8  67.8   70.0"]
    plain = DetectionRow(None, *[100.0] * 7, images=5, macs=39_505_000_000, latency_ms=3.14159)
    assert detection_table([row, plain]).splitlines() == [
        "depth       AP   AP50   AP75    APs    APm    APl  AR100   GMACs    ms",
        "FTTTT|4   50.5   68.2   55.0      -   54.8   67.8   70.0       -     -",
        "-        100.0  100.0  100.0  100.0  100.0  100.0  100.0  39.505  3.14"]


def share(rank: int, folder: str, alone: list[DetectionRow]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = CocoImages(folder, Path(folder, "truth.json"), eval_transform(32))
    net = Oracle(data, module=adn.convert(build("resnet18", num_classes=3)))
    # Image 4 twice: samplers repeat some so that all processes have equally many.
    mine = Subset(data, [0, 2, 4] if rank == 0 else [5, 3, 1, 4])
    rows = evaluate_detector(net, batches(mine, 2), ["super", "TTFF"], distributed=True,
                             results_dir=Path(folder, "results") if rank == 0 else Path(folder, "other"))
    assert rows == alone
    assert not Path(folder, "other").exists()
    dist.destroy_process_group()


def test_two_processes_give_the_rows_of_one(tmp_path: Path, module: nn.Module) -> None:
    data = write(tmp_path, 6)
    alone = evaluate_detector(Oracle(data, module=module), batches(data), ["super", "TTFF"])
    in_two_processes(share, str(tmp_path), alone)
    assert (tmp_path / "results" / "results_TTFF.json").exists()
