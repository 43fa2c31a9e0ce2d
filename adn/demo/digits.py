"""The main job on real data that needs no download: 1,797 handwritten digits, one net, sixteen depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..convert import convert
from ..core.state import state_of
from ..data.scenes import HELD_OUT, read_digits
from ..export.extract import extract
from ..measure.accuracy import evaluate
from ..measure.profile import profile, require_matplotlib
from ..models.registry import create_model
from ..train import Recipe, fit
from . import Demo, is_demo

SIZE = 32  # the 8 x 8 digits are enlarged to this
SHIFT = 4
RECIPE = Recipe(
    model="resnet18", model_kwargs={"channels": [32, 64, 128, 256]}, epochs=16, batch_size=32,
    optimizer="sgd", lr=0.05, weight_decay=5e-4, norm_decay=0.0, bias_decay=0.0, schedule="cosine", warmup_epochs=2,
    warmup_factor=0.1, features=("all",), train_size=SIZE, eval_size=SIZE, eval_resize=SIZE,
)


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's digits (Alpaydin and Kaynak 1998, test part), as float32 (N, 3, 32, 32), grey, and int64 (N,).

    Grey values are scaled to [0, 1], then normalised by `mean` and `std` of the part to learn from. Nothing but the
    final evaluation sees the held-out part.
    """

    x: torch.Tensor
    y: torch.Tensor
    held_out_x: torch.Tensor
    held_out_y: torch.Tensor
    mean: float
    std: float

    @classmethod
    def load(cls) -> Digits:
        grey, digits, order = read_digits()
        x = torch.from_numpy(grey).float()[:, None] / 16
        y, order = torch.from_numpy(digits), torch.from_numpy(order)
        held_out, training = order[:HELD_OUT], order[HELD_OUT:]
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        mean, std = x[training].mean().item(), x[training].std().item()
        # Three equal channels, as a picture of a digit has when it is read from a file.
        x = ((x - mean) / std).expand(-1, 3, -1, -1)
        return cls(x[training], y[training], x[held_out], y[held_out], mean, std)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The training digits in random order, each batch shifted by up to 4 of 32 pixels."""
        for chosen in torch.randperm(len(self.x)).split(RECIPE.batch_size):
            if len(chosen) < RECIPE.batch_size:
                return
            dx, dy = torch.randint(2 * SHIFT + 1, (2,)).tolist()
            padded = F.pad(self.x[chosen], [SHIFT] * 4, value=self.x.min().item())
            yield padded[:, :, dy : dy + SIZE, dx : dx + SIZE], self.y[chosen]

    @property
    def preparation(self) -> dict[str, object]:
        """How a picture of a digit becomes what a net sees, see `adn.data.images.eval_transform`."""
        return {"size": SIZE, "resize": SIZE, "interpolation": "bilinear", "mean": [self.mean] * 3,
                "std": [self.std] * 3}

    def held_out(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.held_out_x.split(120), self.held_out_y.split(120), strict=True))


def new(recipe: Recipe) -> nn.Module:
    """The any-depth net that a recipe is for, with fresh weights; it knows what its classes are called."""
    torch.manual_seed(recipe.seed)
    net = create_model(f"anydepth_{recipe.model}", num_classes=10, **recipe.model_kwargs)
    state_of(net).class_names = [str(digit) for digit in range(10)]
    return net


def run(out: str | Path, *, seed: int = 0, compare: bool = False, epochs: int = RECIPE.epochs, progress: bool = True
        ) -> Demo:
    """Convert, train by self-distillation, evaluate and time all depths; write model, table and figure to `out`.

    Args:
        out: folder; an earlier demo in it is replaced, another run is not.
        seed: of weights, order and shifts. The same seed gives the same accuracies.
        compare: also train the full and the base network separately, for as many epochs.
        epochs: passes over the 1,437 training digits.
        progress: show it.

    Raises:
        ImportError: without scikit-learn or matplotlib, `pip install "adn[demo]"`.
        ValueError: if `out` holds a run that is not a demo.
    """
    require_matplotlib()
    digits, out = Digits.load(), Path(out)
    again = is_demo(out)
    recipe = RECIPE.but(seed=seed, epochs=epochs)
    net = new(recipe)
    fit(net, digits.batches, None, recipe, out=out, overwrite=again, progress=progress,
        config={"demo": True, "recipe": recipe.to_dict()}, extra={"data": digits.preparation})
    rows = evaluate(net, digits.held_out(), progress=progress)
    result = profile(net, digits.held_out_x[:1], accuracy=rows, rounds=40, progress=progress)
    result.to_csv(out / "depths.csv")
    result.plot(out / "depths.png")
    return Demo(net, result, _separately(digits, recipe, progress) if compare else {})


def _separately(digits: Digits, recipe: Recipe, progress: bool) -> dict[str, float]:
    """Top-1 of the source network, and of the network the base-net is, each trained alone from labels."""
    torch.manual_seed(recipe.seed)
    plain = timm.create_model(recipe.model, num_classes=10, **recipe.model_kwargs)
    networks = {"super": plain, "base": extract(convert(plain, inplace=False), "base")}
    top1 = {}
    for which, network in networks.items():
        if progress:
            print(f"training the separate {which} network", flush=True)
        fit(network, digits.batches, None, recipe, progress=progress)
        network.eval()
        with torch.inference_mode():
            right = sum(int((network(x).argmax(1) == y).sum()) for x, y in digits.held_out())
        top1[which] = 100 * right / HELD_OUT
    return top1
