"""Average precision of a detector at every depth, in one pass over the data."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Subset
from torchvision.ops import box_convert

from ..core.depth import Depth
from ..core.files import atomic_write
from ..core.progress import progress_bar
from ..core.state import DepthLike, is_any_depth, state_of
from ..data.coco import CocoImages, Target
from ..models.registry import interface_of
from .accuracy import read_depths, table_of
from .passes import device_of, no_image, of_all_processes, run_over

BACKENDS = ("pycocotools", "faster_coco_eval")


class Detections(NamedTuple):
    """What was found in an image.

    Attributes:
        rows: (n, 6) float32 of x1, y1, x2, y2 in pixels, score, label.
        outlines: run lengths of each, in COCO's format; None if the detector makes none.
    """

    rows: np.ndarray
    outlines: list[dict[str, Any]] | None = None


Found = dict[int, Detections]  # by image id


@dataclasses.dataclass(frozen=True)
class DetectionRow:
    """How well a detector does at one depth.

    Accuracies are None where there is no object, or none of that size, to find.

    Attributes:
        depth: None for a net of one depth.
        ap: COCO's average precision in percent, mean over the classes and IoU 0.50, 0.55, ..., 0.95.
        ap50, ap75: at one IoU.
        aps, apm, apl: of objects with an area of up to 32^2, up to 96^2, and more pixels.
        ar100: average recall in percent, of at most 100 detections per image and class.
        images: how many were evaluated.
        mask_ap, mask_ap50: of outlines, in place of boxes; None where there are none.
        macs, latency_ms: multiply-adds per image, and time, where the caller fills them in.
    """

    depth: Depth | None
    ap: float | None
    ap50: float | None
    ap75: float | None
    aps: float | None
    apm: float | None
    apl: float | None
    ar100: float | None
    images: int
    mask_ap: float | None = None
    mask_ap50: float | None = None
    macs: int | None = None
    latency_ms: float | None = None


# The accuracies of a row, and their places among the numbers that the COCO tools give.
_STATS = {"ap": 0, "ap50": 1, "ap75": 2, "aps": 3, "apm": 4, "apl": 5, "ar100": 8}
_MASK_STATS = {f"mask_{name}": _STATS[name] for name in ("ap", "ap50")}
ACCURACIES, OF_MASKS = tuple(_STATS), tuple(_MASK_STATS)
_DECIMALS = 10


def evaluate_detector(
    net: nn.Module,
    loader: Iterable[tuple[torch.Tensor, list[Target]] | None],
    depths: Iterable[DepthLike] | None = None,
    device: torch.device | str | None = None,
    *,
    amp: torch.dtype | str | None = None,
    progress: bool = True,
    results_dir: str | os.PathLike[str] | None = None,
    backend: str = "pycocotools",
    distributed: bool = False,
) -> list[DetectionRow]:
    """Average precision of a detector at several depths; every batch is read once and runs at all of them.

    In evaluation mode and without gradients. Depth and mode of the net are afterwards what they were. The detections,
    up to 300 per image, are compared with all annotations of the images that the loader gave, crowds included, each
    image once. They are kept until the end, 7 kB per image and depth. Outlines are compared too, where the detector
    makes them and the data have them (`CocoImages` with `masks`).

    Args:
        net: a detector, any-depth or of one depth, that has `num_classes` and `postprocess` of
            `adn.detect.detector.Detector`.
        loader: a DataLoader over `CocoImages`, or a `Subset` of them, with `collate`.
        depths, device, amp, progress: as in `adn.evaluate`.
        results_dir: write COCO's results format there, `results_FFFFF-6.json` for the depth FFFFF|6 (`results.json`
            for a net of one depth).
        backend: "pycocotools", or "faster_coco_eval" for the same numbers sooner.
        distributed: as in `adn.evaluate`; the first process does the comparison.

    Returns:
        One row per depth, in the order given; a single one, of depth None, for a net of one depth.

    Raises:
        ValueError: if data and net do not have the same classes, the images are not fitted as the net wants them, the
            net cannot take images of this size or gives boxes that are not finite, the loader has no `CocoImages`, or
            there is no image at all.
        ImportError: if the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; pass one of {', '.join(map(repr, BACKENDS))}")
    require_backend(backend)
    chosen, found = detections(net, loader, depths, device, amp=amp, progress=progress)
    data, rows = images_of(loader), []
    if distributed:
        found = _gather(found)
    if not distributed or dist.get_rank() == 0:
        if not found[0]:
            raise ValueError(no_image("evaluate on", loader))
        outlined = next(iter(found[0].values())).outlines is not None
        bar = progress_bar(zip(chosen, found, strict=True), desc="compare", total=len(chosen), unit="depth",
                           show=progress)
        for depth, of_depth in bar:
            results = to_results(data, of_depth)
            if results_dir is not None:
                _write(Path(results_dir), depth, results)
            scores = score(data, results, of_depth, backend)
            if outlined:
                scores |= score(data, results, of_depth, backend, outlines=True)
            rows.append(DetectionRow(depth, **scores, images=len(of_depth)))
    box = [rows]
    if distributed:
        dist.broadcast_object_list(box)
    return box[0]


def detections(net: nn.Module, loader: Iterable[tuple[torch.Tensor, list[Target]] | None],
               depths: Iterable[DepthLike] | None = None, device: torch.device | str | None = None, *,
               amp: torch.dtype | str | None = None, progress: bool = True) -> tuple[list[Depth | None], list[Found]]:
    """What a detector finds at several depths, in the order of the loader; arguments and errors as of
    `evaluate_detector`.

    Returns:
        The depths, and of each what was found.
    """
    data = images_of(loader)
    if is_any_depth(net):
        chosen: list[Depth | None] = [*read_depths(net, depths)]
    elif depths is None:
        chosen = [None]
    else:
        raise ValueError(f"this {type(net).__name__} is not any-depth: leave out depths={list(depths)}")
    detector = _detector(net)
    _check_classes(net, detector.num_classes, data)
    letterbox = getattr(detector, "letterbox", False)
    if getattr(data.transform, "letterbox", letterbox) != letterbox:
        raise ValueError(f"the boxes of this {type(detector).__name__} are for images that "
                         f"{'keep' if letterbox else 'do not keep'} their aspect ratio: prepare them by "
                         f"eval_transform(size, letterbox={letterbox})")
    found: list[Found] = [{} for _ in chosen]
    outlined = getattr(detector, "masks", False) and data.masks

    def keep(i: int, outputs: Any, targets: list[Target]) -> None:
        results = detector.postprocess(outputs, [target["size"] for target in targets])
        for target, one in zip(targets, results, strict=True):
            columns = (one["boxes"], one["scores"][:, None], one["labels"][:, None])
            numbers = torch.cat([column.float() for column in columns], dim=1).cpu().numpy()
            if not np.isfinite(numbers).all():
                at = "" if chosen[i] is None else f" at depth {chosen[i]}"
                raise ValueError(f"the net gives boxes or scores that are not finite{at}: its weights, or the amp "
                                 "setting, are not usable")
            outlines = run_lengths(one["masks"]) if outlined else None
            found[i][int(target["image_id"])] = Detections(numbers, outlines)

    run_over(net, loader, chosen, keep, device_of(net, device), amp, progress)
    return chosen, found


def score(data: CocoImages, results: Sequence[Mapping[str, Any]], image_ids: Iterable[int],
          backend: str = "pycocotools", *, outlines: bool = False) -> dict[str, float | None]:
    """The accuracies of a `DetectionRow`, by the COCO tools.

    Args:
        data: with the objects to find.
        results: detections in COCO's results format.
        image_ids: of the images to count; those without a detection count, too.
        backend: see `evaluate_detector`.
        outlines: compare these, not boxes.
    """
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    truth = data.ground_truth(image_ids)
    # What COCO.loadRes makes, which fails on an empty list and gives every box a polygon.
    detections = {**truth, "annotations": [
        {**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for i, result in enumerate(results, 1)]}
    if outlines:
        from pycocotools import mask

        for result in detections["annotations"]:
            result["area"] = float(mask.area(result["segmentation"]))
    with contextlib.redirect_stdout(io.StringIO()):
        tools = []
        for content in (truth, detections):
            coco = COCO()
            coco.dataset = content
            coco.createIndex()
            tools.append(coco)
        evaluation = COCOeval(*tools, "segm" if outlines else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = _MASK_STATS if outlines else _STATS
    numbers = {name: float(evaluation.stats[place]) for name, place in stats.items()}
    # Rounded, as one of the packages adds 2e-16 to what it divides by, for which all found would not be 100 %.
    return {name: None if number < 0 else round(100 * number, _DECIMALS) for name, number in numbers.items()}


def to_results(data: CocoImages, found: Found) -> list[dict[str, Any]]:
    """COCO's results format: category ids of the file, boxes as x, y, width, height in pixels."""
    results = []
    for image_id, (rows, outlines) in found.items():
        boxes = box_convert(torch.from_numpy(rows[:, :4]).double(), "xyxy", "xywh").tolist()
        for i, (box, number, label) in enumerate(zip(boxes, rows[:, 4].tolist(), rows[:, 5].tolist(), strict=True)):
            results.append({"image_id": image_id, "category_id": data.categories[int(label)].id, "bbox": box,
                            "score": number} | ({"segmentation": outlines[i]} if outlines is not None else {}))
    return results


def run_lengths(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Outlines in COCO's format, of probabilities (n, 1, H, W): where they are 0.5 or more."""
    from pycocotools import mask

    inside = (masks[:, 0] >= 0.5).permute(1, 2, 0).byte().cpu().numpy()
    found = mask.encode(np.asfortranarray(inside))
    return [{**one, "counts": one["counts"].decode()} for one in found]  # JSON has no bytes


def detection_table(rows: Sequence[DetectionRow]) -> str:
    """Rows as text in columns; multiply-adds (in billions) and latency where they are known."""
    heads = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    masks = [("mask AP", "mask_ap", 1, 1), ("mask AP50", "mask_ap50", 1, 1)]
    return table_of(rows, [*((head, name, 1, 1) for head, name in zip(heads, _STATS, strict=True)),
                           *(masks if any(row.mask_ap is not None for row in rows) else ()),
                           ("GMACs", "macs", 1e9, 3), ("ms", "latency_ms", 1, 2)])


def require_backend(name: str) -> None:
    """Raise ImportError, saying what to install, where detections could not be compared with annotations."""
    try:
        __import__(name)
    except ImportError as error:
        install = "adn[detect]" if name == "pycocotools" else "faster-coco-eval"
        raise ImportError(f'average precision needs {name}: pip install "{install}"') from error


def _detector(net: nn.Module) -> nn.Module:
    """What says how many classes there are and what outputs mean: the net, or the one in its wrappers."""
    for model in (net, getattr(net, "module", None), interface_of(net)):
        if hasattr(model, "postprocess"):
            return model
    raise ValueError(f"this {type(net).__name__} does not say what its outputs mean: give it the method `postprocess` "
                     "of adn.detect.detector.Detector")


def images_of(loader: Any) -> CocoImages:
    """What a loader of a detector reads.

    Raises:
        ValueError: if that is not known.
    """
    data = getattr(loader, "dataset", None)
    while isinstance(data, Subset):
        data = data.dataset
    if not isinstance(data, CocoImages):
        raise ValueError("the loader does not tell what is in its images: pass a torch DataLoader over CocoImages, or "
                         "over a Subset of them")
    return data


def _check_classes(net: nn.Module, count: int, data: CocoImages) -> None:
    names = data.class_names
    if count != len(names):
        hint = ""
        if (count, len(names)) == (90, 80):
            hint = ". Its labels are numbers of COCO's categories, as in torchvision's weights? Then put them into a " \
                "net for 80 classes and the background: adn.load_weights(adn.create_model(NAME, num_classes=81), " \
                "model.state_dict())"
        raise ValueError(f"{data.file} has {len(names)} categories, the net {count} classes{hint}")
    known = state_of(net).class_names if is_any_depth(net) else None
    if known and known != names:
        i = next(i for i, (ours, theirs) in enumerate(zip(known, names, strict=True)) if ours != theirs)
        raise ValueError(f"class {i} is {names[i]!r} in {data.file} and {known[i]!r} in the net: the labels, which "
                         "follow ascending category id, do not mean the same")


def _gather(found: list[Found]) -> list[Found]:
    """The detections of all processes together; of an image that several had, those of the first."""
    merged: list[Found] = [{} for _ in found]
    for share in reversed(of_all_processes(found)):
        for whole, part in zip(merged, share, strict=True):
            whole.update(part)
    return merged


def _write(folder: Path, depth: Depth | None, results: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "results.json" if depth is None else f"results_{depth}.json".replace("|", "-")
    with atomic_write(folder / name) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")
