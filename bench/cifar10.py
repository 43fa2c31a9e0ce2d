"""One any-depth ResNet on CIFAR-10 against two networks trained separately for its two extremes.

Same recipe, same budget of epochs, several seeds; mean and spread of the top-1 accuracy on the test images, which
nothing but the last evaluation sees. `--data` holds `cifar10_train.npz` and `cifar10_test.npz`, with the arrays
`header`, `tails`, `offsets` and `labels`: image i is the JPEG file `header + tails[offsets[i]:offsets[i+1]]`.

The default optimizer is AdamW: its steps do not shrink with the weight alpha = 0.5 of the super-net's loss, so the same
learning rate means the same for all three networks. With SGD (`--optimizer sgd`) the any-depth net learns at half the
rate of the others, which a run this short does not make up for. The rate was chosen on training images that the small
run does not use (10,000 to 12,000).

    python bench/cifar10.py --data DIR                                       small, on a CPU
    python bench/cifar10.py --data DIR --full --device cuda                  all images, full width
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import columns, header, write_rows
from PIL import Image
from torch import nn

import adn
from adn.train import Recipe, fit

OPTIMIZERS = {"adamw": {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05},
              "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4}}
MEAN, STD = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)


@dataclasses.dataclass(frozen=True)
class Images:
    """Normalised float32 (N, 3, 32, 32) and int64 (N,), on the device."""

    x: torch.Tensor
    y: torch.Tensor

    @classmethod
    def load(cls, path: Path, count: int | None, device: torch.device) -> Images:
        with np.load(path) as file:
            head, tails, offsets = file["header"].tobytes(), file["tails"], file["offsets"]
            labels = file["labels"][:count]
        pixels = np.stack([
            np.asarray(Image.open(io.BytesIO(head + tails[a:b].tobytes())).convert("RGB"))
            for a, b in itertools.pairwise(offsets[: len(labels) + 1])
        ])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return cls(x.to(device), torch.from_numpy(labels).long().to(device))

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled; each image flipped at random and cropped from a border of 4 at its own place."""
        steps = torch.arange(32, device=self.x.device)
        for chosen in torch.randperm(len(self.x), device="cpu").to(self.x.device).split(size):
            if len(chosen) < size:
                return
            x = self.x[chosen]
            x = torch.where((torch.rand(size) < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)
            rows, across = (torch.randint(9, (size,)).to(x.device)[:, None] + steps for _ in range(2))
            padded = F.pad(x, [4] * 4)
            i = torch.arange(size, device=x.device)[:, None, None]
            yield padded[i, :, rows[:, :, None], across[:, None, :]].permute(0, 3, 1, 2).contiguous(), self.y[chosen]


def resnet18(width: int, stride: int) -> nn.Module:
    """timm's ResNet-18 with the stem for small images: one 3x3 convolution, no pooling."""
    net = timm.create_model("resnet18", num_classes=10, channels=[width, 2 * width, 4 * width, 8 * width])
    net.conv1 = nn.Conv2d(3, 64, 3, stride, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


@torch.inference_mode()
def top1(net: nn.Module, test: Images) -> float:
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(test.x.split(500), test.y.split(500), strict=True))
    return 100 * right / len(test.y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--full", action="store_true",
                        help="all images, width 64, no stride in the stem, 30 epochs, bf16; for a GPU")
    parser.add_argument("--epochs", type=int, help="default: 12, with --full 30")
    parser.add_argument("--batch-size", type=int, help="default: 64, with --full 256")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--lr", type=float, help="default: 0.002 for AdamW, 0.05 for SGD; with --full 0.2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    scale = {"epochs": 30, "batch_size": 256, "amp": "bf16", "channels_last": True} if args.full else \
        {"epochs": 12, "batch_size": 64}
    scale |= OPTIMIZERS[args.optimizer]
    if args.full and args.optimizer == "sgd":
        scale["lr"] = 0.2
    scale |= {name: value for name in ("epochs", "batch_size", "lr") if (value := getattr(args, name)) is not None}
    base_recipe = Recipe(
        **scale, norm_decay=0.0, bias_decay=0.0, schedule="cosine",
        warmup_epochs=2, warmup_factor=0.1,
    )
    device = torch.device(args.device)
    train = Images.load(args.data / "cifar10_train.npz", None if args.full else 10_000, device)
    test = Images.load(args.data / "cifar10_test.npz", None if args.full else 2_000, device)
    shape = {"width": 64, "stride": 1} if args.full else {"width": 16, "stride": 2}

    rows = []
    for seed in args.seeds:
        recipe = base_recipe.but(seed=seed)
        torch.manual_seed(seed)
        source = resnet18(**shape)
        networks = {
            "separate full": adn.extract(adn.convert(source, inplace=False), "super"),
            "separate base": adn.extract(adn.convert(source, inplace=False), "base"),
            "any-depth": adn.convert(source),
        }
        for what, net in networks.items():
            start = time.perf_counter()
            net.to(device)
            fit(net, lambda _epoch, size=recipe.batch_size: train.batches(size), None, recipe, progress=False)
            seconds = round(time.perf_counter() - start, 1)
            if what == "any-depth":
                for depth in adn.depths(net):
                    with adn.at_depth(net, depth):
                        rows.append({"seed": seed, "network": what, "depth": str(depth), "top1": top1(net, test),
                                     "train_seconds": seconds})
            else:
                rows.append({"seed": seed, "network": what, "depth": "FFFF" if "full" in what else "TTTT",
                             "top1": top1(net, test), "train_seconds": seconds})
            print(f"seed {seed}, {what}: {seconds} s", flush=True)

    table = [("network", "depth", "top-1 mean", "lowest", "highest")]
    for key in dict.fromkeys((row["network"], row["depth"]) for row in rows):
        values = [row["top1"] for row in rows if (row["network"], row["depth"]) == key]
        table.append((*key, f"{np.mean(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"))
    print(columns(table))
    if args.csv:
        write_rows(args.csv, rows, header(device) | {"train images": str(len(train.y)),
                                                     "test images": str(len(test.y)), "recipe": str(scale)})


if __name__ == "__main__":
    main()
