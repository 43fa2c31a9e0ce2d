"""Recipes, learning rates, parameter groups, weight average, order of images: the parts of training."""

from __future__ import annotations

import dataclasses
import math

import pytest
import timm
import torch
from conftest import randomise
from torch import nn

import adn
from adn.train import RECIPES, Recipe, TrainBatches, mixing, recipe, train_sampler, train_transform
from adn.train.optim import (
    WeightAverage,
    create_optimizer,
    create_scheduler,
    ema_decay,
    parameter_groups,
    warm_momentum,
)

COMMON = {"alpha": 0.5, "temperature": 1.0, "top_classes": 500, "features": (), "variant": "neurips", "flip": 0.5,
          "momentum": 0.9, "gamma": 0.1, "eval_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SPEC = {
    "resnet50-150": {
        "model": "resnet50", "epochs": 150, "batch_size": 64, "optimizer": "momentum", "lr": 0.1, "weight_decay": 1e-4,
        "norm_decay": 0, "bias_decay": 0, "schedule": "steps", "milestones": (60, 100, 140), "label_smoothing": 0,
        "mixup": 0, "cutmix": 0, "augment": None, "erase": 0, "repeats": 1, "clip": None, "amp": None, "ema": False,
        "train_size": 224, "eval_resize": 256, "interpolation": "bilinear"},
    "resnet50-600": {
        "model": "resnet50", "epochs": 600, "batch_size": 256, "optimizer": "momentum", "lr": 0.5, "weight_decay": 2e-5,
        "norm_decay": 0, "bias_decay": 0, "schedule": "cosine", "warmup_epochs": 5, "warmup_factor": 0.01, "lr_min": 0,
        "label_smoothing": 0, "mixup": 0.2, "cutmix": 1.0, "augment": "trivial", "erase": 0.1, "repeats": 4,
        "clip": None, "amp": "fp16", "ema": True, "train_size": 176, "eval_resize": 232, "interpolation": "bilinear"},
    "mobilenetv2-300": {
        "model": "mobilenetv2_100", "epochs": 300, "batch_size": 64, "optimizer": "momentum", "lr": 0.1,
        "weight_decay": 1e-5, "norm_decay": 0, "bias_decay": 0, "schedule": "steps", "milestones": (150, 225, 285),
        "label_smoothing": 0, "mixup": 0, "cutmix": 0, "augment": None, "erase": 0, "repeats": 1, "clip": None,
        "amp": None, "ema": False, "train_size": 224, "eval_resize": 256, "interpolation": "bilinear"},
    "swin-t-300": {
        "model": "swin_tiny_patch4_window7_224", "epochs": 300, "batch_size": 256, "optimizer": "adamw", "lr": 1e-3,
        "weight_decay": 0.05, "norm_decay": 0, "bias_decay": 0, "table_decay": 0, "schedule": "cosine", "lr_min": 1e-5,
        "warmup_epochs": 20, "warmup_factor": 0.01, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
        "augment": "trivial", "erase": 0.25, "repeats": 4, "clip": 5.0, "amp": "fp16", "ema": True, "train_size": 224,
        "eval_resize": 224, "interpolation": "bicubic"},
    "vit-b16-300": {
        "model": "vit_base_patch16_224", "epochs": 300, "batch_size": 256, "optimizer": "adamw", "lr": 7.5e-4,
        "weight_decay": 0.2, "norm_decay": None, "bias_decay": None, "schedule": "cosine", "lr_min": 0,
        "warmup_epochs": 30, "warmup_factor": 0.033, "label_smoothing": 0.11, "mixup": 0.2, "cutmix": 1.0,
        "augment": "rand", "magnitude": 9, "erase": 0, "repeats": 3, "clip": 1.0, "amp": "fp16", "ema": True,
        "train_size": 224, "eval_resize": 256, "interpolation": "bilinear"},
}


@pytest.mark.parametrize("name", SPEC)
def test_published_recipes(name: str) -> None:
    values = dataclasses.asdict(RECIPES[name])
    assert {key: values[key] for key in (*COMMON, *SPEC[name])} == COMMON | SPEC[name]
    assert "anydepth_" + values["model"] in adn.models.registry.list_models()
    assert Recipe.from_dict(RECIPES[name].to_dict()) == RECIPES[name]


def test_reference_defaults() -> None:
    plain = Recipe()
    assert (plain.optimizer, plain.lr, plain.momentum) == ("momentum", 0.1, 0.9)
    assert (plain.weight_decay, plain.gamma) == (1e-4, 0.1)
    assert (plain.ema_decay, plain.ema_every, plain.warmup_factor) == (0.99998, 32, 0.01)


def test_another_model_drops_the_arguments_of_the_first() -> None:
    assert recipe("mobilenetv2-300").model_kwargs == {"drop_rate": 0.2}
    assert recipe("mobilenetv2-300", model="resnet18").model_kwargs == {}
    assert recipe("mobilenetv2-300", model="resnet18", model_kwargs={"drop_rate": 0}).model_kwargs == {"drop_rate": 0}


@pytest.mark.parametrize(("change", "said"), [
    ({"epochs": 0}, "epochs=0"), ({"lr": -1.0}, "lr=-1"), ({"alpha": 1.5}, "alpha"), ({"clip": 0.0}, "clip"),
    ({"amp": "fp32"}, "bf16, fp16, or none"), ({"schedule": "line"}, "steps, cosine, linear, constant"),
    ({"milestones": (60, 30)}, "ascending"), ({"optimizer": "sdg"}, "sdg"), ({"lrr": 1}, "lrr"),
])
def test_bad_settings(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe().but(**change)


def test_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="resnet50-150"):
        recipe("resnet")


# -------------------------------------------------------------------------------------------------------- learning rate


def rates(r: Recipe) -> list[float]:
    optimizer = create_optimizer(nn.Linear(2, 2), r)
    scheduler = create_scheduler(optimizer, r)
    found = []
    for epoch in range(r.epochs):
        scheduler.step(epoch)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    return found


def torch_rates(r: Recipe) -> list[float]:
    """What torch's schedulers, which the reference uses, make of the same settings."""
    from torch.optim import lr_scheduler as s

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=r.lr)
    main = (s.MultiStepLR(optimizer, r.milestones, r.gamma) if r.schedule == "steps"
            else s.CosineAnnealingLR(optimizer, r.epochs - r.warmup_epochs, r.lr_min))
    if r.warmup_epochs:
        warmup = s.LinearLR(optimizer, r.warmup_factor, total_iters=r.warmup_epochs)
        main = s.SequentialLR(optimizer, [warmup, main], [r.warmup_epochs])
    found = []
    for _ in range(r.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SPEC)
def test_learning_rates(name: str) -> None:
    r = RECIPES[name]
    assert rates(r) == pytest.approx(torch_rates(r), rel=1e-6, abs=1e-9)


def test_rates_between_epochs() -> None:
    r = Recipe(epochs=10, lr=0.1, lr_min=0.001, schedule="linear", warmup_epochs=2, warmup_factor=0.0, momentum=0.9,
               warmup_momentum=0.5)
    optimizer = create_optimizer(nn.Linear(2, 2), r)
    scheduler = create_scheduler(optimizer, r)
    for epoch, lr, momentum in ((0, 0, 0.5), (0.5, 0.025, 0.6), (1.5, 0.075, 0.8), (2, 0.0802, 0.9),
                                (5.25, 0.048025, 0.9), (10, 0.001, 0.9)):
        scheduler.step(epoch)
        warm_momentum(optimizer, r, epoch)
        for group in optimizer.param_groups:
            assert (group["lr"], group["momentum"]) == (pytest.approx(lr, abs=1e-12), pytest.approx(momentum))
    smooth = Recipe(epochs=10, lr=0.1, schedule="cosine", warmup_epochs=2, warmup_factor=0.0)
    scheduler = create_scheduler(optimizer := create_optimizer(nn.Linear(2, 2), smooth), smooth)
    scheduler.step(6.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 4.5 / 8)))
    warm_momentum(create_optimizer(nn.Linear(2, 2), adam := r.but(optimizer="adamw")), adam, 1.0)  # has none


def test_learning_rates_by_hand() -> None:
    steps = rates(RECIPES["resnet50-150"])
    assert [steps[e] for e in (0, 59, 60, 99, 100, 139, 140)] == pytest.approx([.1, .1, .01, .01, .001, .001, .0001])
    swin = rates(RECIPES["swin-t-300"])
    assert swin[0] == pytest.approx(1e-5)
    assert swin[10] == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert swin[20] == pytest.approx(1e-3)
    assert swin[160] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2)
    assert swin[299] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * 279 / 280)))
    assert rates(Recipe(epochs=3, schedule="constant", lr=0.3)) == [0.3] * 3
    assert rates(Recipe(epochs=1, schedule="cosine", lr=0.3)) == [0.3]


# --------------------------------------------------------------------------------------------------- parameter groups


def test_parameter_groups_of_a_resnet() -> None:
    net = adn.convert(timm.create_model("resnet18", num_classes=3))
    r = Recipe(weight_decay=1e-4, norm_decay=0.0, bias_decay=0.5)
    weights, norms, biases = parameter_groups(net, r)
    assert (weights["weight_decay"], norms["weight_decay"], biases["weight_decay"]) == (1e-4, 0.0, 0.5)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in norms["params"]} == {n for n in names.values()
                                                       if ("bn" in n or "downsample.1" in n) and n.endswith("weight")}
    assert "layer1.0.bn1.skip.weight" in {names[id(p)] for p in norms["params"]}
    assert {names[id(p)] for p in biases["params"]} == {n for n in names.values() if n.endswith("bias")}
    assert sum(len(group["params"]) for group in (weights, norms, biases)) == len(names)


def test_tables_and_unset_decays() -> None:
    net = adn.convert(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, embed_dim=12, depths=(2, 2),
                                        num_heads=(3, 6)))
    groups = parameter_groups(net, RECIPES["swin-t-300"])
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.0, 0.0]
    assert len(groups[3]["params"]) == 4
    unset = parameter_groups(net, RECIPES["vit-b16-300"])
    assert [group["weight_decay"] for group in unset] == [0.2] * 4


def test_frozen_parameters_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, Recipe())) == 2


def test_momentum_is_plain_sgd() -> None:
    optimizer = create_optimizer(nn.Linear(2, 2), RECIPES["resnet50-150"])
    assert isinstance(optimizer, torch.optim.SGD)
    assert not optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["momentum"] == 0.9


# ----------------------------------------------------------------------------------------------------- weight average


def test_decay_of_the_weight_average() -> None:
    long = RECIPES["resnet50-600"]
    assert ema_decay(long, 4) == pytest.approx(1 - 2e-5 * 4 * 256 * 32 / 600)
    assert ema_decay(long.but(epochs=1, batch_size=4096), 4) == 0.0  # capped


def test_weight_average() -> None:
    torch.manual_seed(0)
    net = adn.convert(randomise(timm.create_model("resnet18", num_classes=3, channels=(4, 4, 4, 4))))
    r = Recipe(ema=True, warmup_epochs=1, epochs=2, batch_size=100, ema_decay=0.999, ema_every=2)
    average = WeightAverage(net, r, 1)
    decay = 1 - 0.001 * 100 * 2 / 2
    assert ema_decay(r, 1) == pytest.approx(decay)
    skip = dict(net.named_modules())["layer1.0.bn1.skip"]

    def move(counter: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for value in net.state_dict().values():
                value.add_(torch.rand_like(value)) if value.is_floating_point() else value.fill_(counter)
        return {name: value.clone() for name, value in net.state_dict().items()}

    for epoch in (0, 0, 1):  # twice in warm-up, and once after it: copies
        now = move(10)
        average.update_in(epoch, net)
        assert all(torch.equal(value, now[name]) for name, value in average.module.state_dict().items())
    before, now = now, move(15)
    average.update_in(1, net)
    for name, value in average.module.state_dict().items():
        expected = decay * before[name].double() + (1 - decay) * now[name].double()
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert value == 10  # 0.9 * 10 + 0.1 * 15 = 10.5, truncated
    assert skip.running_mean.abs().sum() > 0
    assert not torch.equal(before["layer1.0.bn1.skip.running_var"], average.module.layer1[0].bn1.skip.running_var)


def test_index_tables_are_not_averaged() -> None:
    net = nn.Module()
    net.register_buffer("index", torch.arange(100))
    net.weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage(net, Recipe(ema=True, batch_size=7, epochs=3), 1)
    for _ in range(5):
        average.update_in(0, net)
    assert torch.equal(average.module.index, net.index)


# --------------------------------------------------------------------------------------------------------------- images


class Numbered(torch.utils.data.Dataset):
    """Item i is an image full of i, and a draw of every generator in the second channel."""

    def __init__(self, count: int, unreadable: tuple[int, ...] = ()) -> None:
        self.count, self.unreadable = count, unreadable

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        if index in self.unreadable:
            return None
        image = torch.full((3, 4, 4), float(index))
        image[1] = torch.rand(())
        return image, index % 3


def drawn(batches: TrainBatches, epoch: int) -> list[tuple[list[float], list[float]]]:
    torch.manual_seed(99)  # the loader's own order must not depend on this, its augmentation only without workers
    return [(x[:, 0, 0, 0].tolist(), x[:, 1, 0, 0].tolist()) for x, _ in batches(epoch)]


def test_order_and_augmentation_follow_from_seed_and_epoch() -> None:
    r = Recipe(batch_size=4, seed=3)
    first = drawn(TrainBatches(Numbered(12), r, 3, workers=2), 5)
    torch.rand(7)
    assert drawn(TrainBatches(Numbered(12), r, 3, workers=2), 5) == first
    draws = [value for _, values in first for value in values]
    assert len(set(draws)) == 12  # workers do not repeat each other
    for other in (drawn(TrainBatches(Numbered(12), r, 3, workers=2), 6),
                  drawn(TrainBatches(Numbered(12), r.but(seed=4), 3, workers=2), 5)):
        assert [order for order, _ in other] != [order for order, _ in first]
        assert not set(draws) & {value for _, values in other for value in values}
    assert sorted(index for order, _ in first for index in order) == list(range(12))


def test_processes_share_the_images() -> None:
    r = Recipe(batch_size=4)
    seen = [index for rank in (0, 1) for index in train_sampler(Numbered(12), r, 0, rank, 2)]
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize(("images", "world", "expected"), [(600, 1, 512), (600, 2, 256), (100, 1, 100), (100, 2, 50)])
def test_repeated_augmentation(images: int, world: int, expected: int) -> None:
    data, r = Numbered(images), Recipe(repeats=4, seed=1)
    shares = [list(train_sampler(data, r, 0, rank, world)) for rank in range(world)]
    assert [len(share) for share in shares] == [expected] * world
    together = [index for group in zip(*shares, strict=True) for index in group]
    distinct = together[::4]
    assert together == [index for index in distinct for _ in range(4)]
    assert len(set(distinct)) == len(distinct)
    assert distinct != sorted(distinct)
    assert list(train_sampler(data, r, 1, 0, world)) != shares[0]
    assert list(train_sampler(data, r.but(seed=2), 0, 0, world)) != shares[0]


def test_a_last_batch_of_one_is_left_out() -> None:
    assert [len(y) for _, y in TrainBatches(Numbered(9), Recipe(batch_size=4), 3)(0)] == [4, 4]
    assert [len(y) for _, y in TrainBatches(Numbered(10), Recipe(batch_size=4), 3)(0)] == [4, 4, 2]
    assert [len(y) for _, y in TrainBatches(Numbered(3), Recipe(batch_size=1), 3)(0)] == [1, 1, 1]


def test_unreadable_images_are_left_out_of_the_batch() -> None:
    batches = list(TrainBatches(Numbered(4, unreadable=(0, 1, 2, 3)), Recipe(batch_size=4), 3)(0))
    assert batches == [None]
    (batch,) = TrainBatches(Numbered(4, unreadable=(2,)), Recipe(batch_size=4), 3)(0)
    assert sorted(batch[0][:, 0, 0, 0].tolist()) == [0, 1, 3]
    assert list(TrainBatches(Numbered(4, unreadable=(0, 2, 3)), Recipe(batch_size=4), 3)(0)) == [None]


def test_mixing_partners_are_the_batch_rolled_by_one() -> None:
    x, y = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous(), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    mixed, rows = mixing(Recipe(mixup=1.0), 3)(x, y)
    share = (rows[1, 1] - 0).item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * x + (1 - share) * x.roll(1, 0))
    expected = share * nn.functional.one_hot(y, 3) + (1 - share) * nn.functional.one_hot(y.roll(1), 3)
    torch.testing.assert_close(rows, expected.float())

    mixed, rows = mixing(Recipe(cutmix=1.0), 3)(x, y)
    partner = x.roll(1, 0)
    assert ((mixed == x) | (mixed == partner)).all()
    torch.testing.assert_close(rows[1, 1].item(), (mixed[1] == x[1]).float().mean().item())


def test_one_of_mixup_and_cutmix_is_drawn_per_batch() -> None:
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    mix = mixing(Recipe(mixup=0.8, cutmix=1.0), 3)
    torch.manual_seed(0)
    kept = [bool((mix(x, y)[0] == x).any()) for _ in range(40)]  # cutmix keeps pixels as they were
    assert 5 < sum(kept) < 35
    assert mixing(Recipe(), 3) is None


@pytest.mark.parametrize("r", [RECIPES["swin-t-300"], RECIPES["vit-b16-300"], RECIPES["resnet50-150"]])
def test_training_transform(r: Recipe) -> None:
    from PIL import Image
    from torchvision.transforms import v2

    config = {"size": 20, "interpolation": r.interpolation, "mean": r.mean, "std": r.std, "resize": None}
    transform = train_transform(r.but(erase=0.0), config)
    image = Image.new("RGB", (37, 23), (255, 128, 0))
    torch.manual_seed(0)
    x = transform(image)
    assert x.shape == (3, 20, 20)
    assert x.dtype == torch.float32
    kinds = [type(step) for step in train_transform(r, config).transforms]
    assert (v2.TrivialAugmentWide in kinds, v2.RandAugment in kinds, v2.RandomErasing in kinds) == (
        r.augment == "trivial", r.augment == "rand", r.erase > 0)
    assert kinds.index(v2.RandomResizedCrop) < kinds.index(v2.RandomHorizontalFlip) < kinds.index(v2.Normalize)
    if r.augment is None:  # one colour everywhere stays so, normalised
        expected = (torch.tensor([255, 128, 0]) / 255 - torch.tensor(r.mean)) / torch.tensor(r.std)
        torch.testing.assert_close(x, expected.view(3, 1, 1).expand(3, 20, 20))
