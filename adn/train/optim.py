"""Optimizer, learning rate and weight average, as recipes ask for them."""

from __future__ import annotations

import math

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from adn_kernels import private

from ..core.behaviours import is_norm
from ..settings import Settings

TABLES = ("cls_token", "class_token", "dist_token", "reg_token", "pos_embed", "pos_embedding", "position_embedding",
          "relative_position_bias_table")
_FUSED = ("adam", "adamw", "momentum", "nesterov", "sgd")  # those of torch that update all parameters in one call


def parameter_groups(net: nn.Module, recipe: Settings) -> list[dict]:
    """The parameters that learn, in groups, each with its own weight decay: weights, norms, biases, tables; and those
    that have a learning rate of their own apart from the others.

    A parameter whose own name is `bias` is a bias, of a classifier also in a norm; the rest of a norm (twins included)
    is a norm. Of a detector all of a norm is, and biases are also called `in_proj_bias`, as in RT-DETR's recipes.
    Which groups there are depends on the net only, so that a run may be resumed with other decays.
    """
    decays = {"weights": None, "norms": recipe.norm_decay, "biases": recipe.bias_decay, "tables": recipe.table_decay}
    rates = {"": recipe.lr, **recipe.rates}
    groups: dict[tuple[str, str], list[nn.Parameter]] = {(start, kind): [] for start in rates for kind in decays}
    seen: set[int] = set()
    for prefix, module in net.named_modules():
        start = next((start for start in recipe.rates if f"{prefix}.".startswith(start)), "")
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_bias = f".{name}".endswith(recipe.bias_ending) and not (recipe.whole_norms and is_norm(module))
            kind = "biases" if is_bias else "norms" if is_norm(module) else "tables" if name in TABLES else "weights"
            groups[start, kind].append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays[kind] is None else decays[kind],
         "lr": rates[start]}
        for (start, kind), parameters in groups.items() if parameters
    ]


def create_optimizer(net: nn.Module, recipe: Settings) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `parameter_groups`."""
    # A gradient scaler's fused steps on a CPU go wrong where a gradient is infinite (torch 2.15).
    fused = recipe.optimizer in _FUSED and recipe.amp != "fp16"
    try:
        return timm.optim.create_optimizer_v2(
            parameter_groups(net, recipe), opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum, **({"fused": True} if fused else {}),
        )
    except (AssertionError, ImportError) as error:
        raise ValueError(f"timm's optimizer {recipe.optimizer!r} cannot be made here ({error}); choose another one by "
                         "--optimizer") from error


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Settings) -> Scheduler:
    """The learning rate as a function of the epoch: `scheduler.step(epoch)` sets that of `epoch`, counted from 0.

    Linear warm-up from `warmup_factor * lr`, then, counted from its end: steps, at each milestone m for epochs >= m;
    half a cosine from `lr` to `lr_min` over the epochs that are left; or nothing. A line from `lr` to `lr_min` over all
    epochs is counted from the beginning, as YOLO's recipes have it. The epoch may be a fraction.
    """
    warmup = {"warmup_t": recipe.warmup_epochs, "warmup_lr_init": recipe.warmup_factor * recipe.lr,
              "warmup_prefix": True}
    if recipe.schedule == "cosine":
        # A period of 1 and one of 2 begin alike, but timm warns of the former.
        period = max(2, recipe.epochs - recipe.warmup_epochs)
        return timm.scheduler.CosineLRScheduler(optimizer, period, lr_min=recipe.lr_min, **warmup)
    if recipe.schedule == "linear":
        return timm.scheduler.PolyLRScheduler(optimizer, max(2, recipe.epochs), power=1, lr_min=recipe.lr_min,
                                              **warmup | {"warmup_prefix": False})
    # timm applies a milestone m from epoch m - 1 on, the reference (torch's MultiStepLR) from epoch m.
    milestones = [m + 1 for m in recipe.milestones] if recipe.schedule == "steps" else []
    return timm.scheduler.MultiStepLRScheduler(optimizer, milestones, decay_rate=recipe.gamma, **warmup)


def warm_momentum(optimizer: torch.optim.Optimizer, recipe: Settings, epoch: float) -> None:
    """Set that of `epoch`, counted from 0: during warm-up on the line from `warmup_momentum` to `momentum`."""
    start = recipe.warmup_momentum
    if start is not None and recipe.warmup_epochs:
        momentum = start + (recipe.momentum - start) * min(1, epoch / recipe.warmup_epochs)
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum


def ema_decay(recipe: Settings, world: int) -> float:
    """Decay per update of the weight average: `1 - min(1, (1 - ema_decay) * world * batch * every / epochs)`, as in the
    reference (after torchvision's)."""
    return 1 - min(1.0, (1 - recipe.ema_decay) * world * recipe.batch_size * recipe.ema_every / recipe.epochs)


class WeightAverage(ModelEmaV3):
    """timm's moving average of parameters and buffers, both sets of running statistics included, as the reference does
    it: batch norm's counters are averaged and truncated; during warm-up, and once after it, weights are copied. With
    `ema_ramp` as that of RT-DETR, whose decay rises instead.

    Other integer buffers (index tables) are copied. The reference averages and truncates those too, which may round
    an index down.
    """

    def __init__(self, net: nn.Module, recipe: Settings, world: int) -> None:
        super().__init__(net, decay=recipe.ema_decay if recipe.ema_ramp else ema_decay(recipe, world))
        self.warmup_epochs = 0 if recipe.ema_ramp else recipe.warmup_epochs
        self.ramp = recipe.ema_ramp
        self.started = False
        self.updates = 0

    def update_in(self, epoch: int, net: nn.Module) -> None:
        """Average in the weights of `net`, during `epoch` counted from 0."""
        self.updates += 1
        if self.started or self.ramp:
            self.update(net)
        else:
            self.set(net)
        self.started = epoch >= self.warmup_epochs

    def get_decay(self, step: int | None = None) -> float:
        return self.decay * (1 - math.exp(-self.updates / self.ramp)) if self.ramp else super().get_decay(step)

    @torch.no_grad()
    def apply_update_(self, net: nn.Module, decay: float) -> None:
        average, now = self.module.state_dict(), net.state_dict()  # once each: of deep nets they take milliseconds
        numbers = [name for name, value in average.items() if value.is_floating_point()]
        private.lerp_all([average[name] for name in numbers], [now[name] for name in numbers], 1 - decay)
        for name in average.keys() - set(numbers):
            value = now[name]
            if name.endswith("num_batches_tracked"):
                value = decay * average[name] + (1 - decay) * value
            average[name].copy_(value)
