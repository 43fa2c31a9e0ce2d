"""A detector: scenes of real handwritten digits, one any-depth YOLO, 256 depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ..core.state import at_depth, state_of
from ..data.coco import CocoImages, collate, open_coco
from ..data.scenes import CLASSES, write_scenes
from ..data.transforms import eval_transform
from ..detect.draw import draw_detections, grid
from ..export.extract import extract
from ..measure.accuracy import chain
from ..measure.average_precision import evaluate_detector
from ..measure.profile import profile, require_matplotlib
from ..models.registry import create_model
from ..settings import Settings
from ..tasks import DETECT, augmentation
from ..train import TrainBatches, fit
from ..train.recipes import DETECTION_RECIPES
from . import Demo, is_demo

RECIPE = DETECTION_RECIPES["yolo-digits"]
IMAGES, HELD_OUT = 1000, 200
ROUNDS = 40  # of each depth, timed
_SHOWN = (0, 2, 3)  # of the scenes that are held out, some with digits
_ENLARGED = 3
_DRAWN = 0.3  # score, at least: a net of a few epochs is not sure of much


class Scenes(NamedTuple):
    training: CocoImages
    held_out: CocoImages

    @classmethod
    def make(cls, out: Path, progress: bool = True) -> Scenes:
        """Those of `out`, or new ones."""
        write_scenes(out, IMAGES, HELD_OUT, RECIPE.size, progress=progress)
        training, held_out = (open_coco(out, split) for split in ("train", "val"))
        training.transform = augmentation(RECIPE, training, letterbox=True)
        held_out.transform = eval_transform(RECIPE.size, letterbox=True)
        return cls(training, held_out)

    def loader(self) -> DataLoader:
        return DataLoader(self.held_out, 50, collate_fn=collate)


def run(out: str | Path, *, seed: int = 0, compare: bool = False, epochs: int = RECIPE.epochs, progress: bool = True
        ) -> Demo:
    """Train by self-distillation; evaluate and time the depths from super to base; write model, table, figure and a
    picture of what both extremes find to `out`.

    Args:
        out: folder; an earlier demo in it is replaced, another run is not.
        seed: of weights and order. The same seed gives the same numbers.
        compare: also train the base network separately, for as many epochs.
        epochs: passes over the scenes.
        progress: show it.

    Raises:
        ImportError: without scikit-learn, matplotlib or pycocotools, `pip install "adn[demo]"`.
        ValueError: if `out` holds a run that is not a demo.
    """
    require_matplotlib()
    DETECT.require()
    out = Path(out)
    again, scenes = is_demo(out), Scenes.make(out / "scenes", progress)
    recipe = RECIPE.but(seed=seed, epochs=epochs)
    torch.manual_seed(seed)
    net = _learnt(_new(recipe), scenes, recipe, progress, out=out, overwrite=again,
                  config={"demo": True, "recipe": recipe.to_dict()}, extra={"data": {"size": recipe.size}})
    depths = chain(net)
    rows = evaluate_detector(net, scenes.loader(), depths, progress=progress)
    image, _ = scenes.held_out[0]
    result = profile(net, image[None], depths=depths, accuracy=rows, rounds=ROUNDS, progress=progress)
    result.to_csv(out / "depths.csv")
    result.plot(out / "depths.png")
    picture(net, scenes.held_out).save(out / "detections.png")
    return Demo(net, result, _separately(scenes, recipe, progress) if compare else {})


def picture(net: nn.Module, data: CocoImages) -> Image.Image:
    """What the super-net, on the left, and the base-net find on some scenes."""
    found = []
    for index in _SHOWN:
        scene, _ = data.untransformed(index)
        large = scene.resize([_ENLARGED * side for side in scene.size])
        row = []
        for depth in ("super", "base"):
            with at_depth(net, depth):
                objects = DETECT.find(net, large, DETECT.preparation(net, size=RECIPE.size))
            row.append(draw_detections(large, objects, CLASSES, threshold=_DRAWN))
        found.append(row)
    return grid(found, ("super", "base"))


def _new(recipe: Settings) -> nn.Module:
    torch.manual_seed(recipe.seed)
    net = create_model(recipe.model, num_classes=len(CLASSES), **recipe.model_kwargs)
    state_of(net).class_names = [*CLASSES]
    return net


def _learnt(net: nn.Module, scenes: Scenes, recipe: Settings, progress: bool, **options: Any) -> nn.Module:
    batches = TrainBatches(scenes.training, recipe, collate=collate)
    return fit(net, batches, None, recipe, loss=DETECT.loss(net, recipe), progress=progress, **options).net


def _separately(scenes: Scenes, recipe: Settings, progress: bool) -> dict[str, float]:
    """Average precision of the networks that the extremes are, each trained alone from the objects."""
    found = {}
    for which in ("super", "base"):
        if progress:
            print(f"training the separate {which} network", flush=True)
        network = _learnt(extract(_new(recipe), which), scenes, recipe, progress)
        row, = evaluate_detector(network, scenes.loader(), progress=progress)
        found[which] = row.ap
    return found
