"""Optimizer, learning rate and weight average, as recipes ask for them."""

from __future__ import annotations

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from ..nn import is_norm
from .recipes import Recipe

TABLES = ("cls_token", "class_token", "dist_token", "reg_token", "pos_embed", "pos_embedding", "position_embedding",
          "relative_position_bias_table")
COUNTER = "num_batches_tracked"


def parameter_groups(net: nn.Module, recipe: Recipe) -> list[dict]:
    """The parameters that learn, in up to four groups, each with its own weight decay: weights, norms, biases, tables.

    A parameter whose own name is `bias` is a bias, also in a norm; the rest of a norm (twins included) is a norm.
    Which groups there are depends on the net only, so that a run may be resumed with other decays.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": [], "tables": []}
    seen: set[int] = set()
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = ("biases" if name == "bias" else "norms" if is_norm(module) else "tables" if name in TABLES
                    else "weights")
            groups[kind].append(parameter)
    decays = {"norms": recipe.norm_decay, "biases": recipe.bias_decay, "tables": recipe.table_decay}
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays.get(kind) is None else decays[kind]}
        for kind, parameters in groups.items() if parameters
    ]


def create_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `parameter_groups`."""
    try:
        return timm.optim.create_optimizer_v2(
            parameter_groups(net, recipe), opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
    except (AssertionError, ImportError) as error:
        raise ValueError(f"timm's optimizer {recipe.optimizer!r} cannot be made here ({error}); choose another one by "
                         "--optimizer") from error


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Scheduler:
    """The learning rate as a function of the epoch: `scheduler.step(epoch)` sets that of `epoch`, counted from 0.

    Linear warm-up from `warmup_factor * lr`, then, counted from its end: steps, at each milestone m for epochs >= m;
    half a cosine from `lr` to `lr_min` over the epochs that are left; or nothing.
    """
    warmup = {"warmup_t": recipe.warmup_epochs, "warmup_lr_init": recipe.warmup_factor * recipe.lr,
              "warmup_prefix": True}
    if recipe.schedule == "cosine":
        # A period of 1 and one of 2 begin alike, but timm warns of the former.
        period = max(2, recipe.epochs - recipe.warmup_epochs)
        return timm.scheduler.CosineLRScheduler(optimizer, period, lr_min=recipe.lr_min, **warmup)
    # timm applies a milestone m from epoch m - 1 on, the reference (torch's MultiStepLR) from epoch m.
    milestones = [m + 1 for m in recipe.milestones] if recipe.schedule == "steps" else []
    return timm.scheduler.MultiStepLRScheduler(optimizer, milestones, decay_rate=recipe.gamma, **warmup)


def ema_decay(recipe: Recipe, world: int) -> float:
    """Decay per update of the weight average: `1 - min(1, (1 - ema_decay) * world * batch * every / epochs)`, as in the
    reference (after torchvision's)."""
    return 1 - min(1.0, (1 - recipe.ema_decay) * world * recipe.batch_size * recipe.ema_every / recipe.epochs)


class WeightAverage(ModelEmaV3):
    """timm's moving average of parameters and buffers, both sets of running statistics included, as the reference does
    it: batch norm's counters are averaged and truncated; during warm-up, and once after it, weights are copied.

    Other integer buffers (index tables) are copied. The reference averages and truncates those too, which may round
    an index down.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, world: int) -> None:
        super().__init__(net, decay=ema_decay(recipe, world))
        self.warmup_epochs = recipe.warmup_epochs
        self.started = False

    def update_in(self, epoch: int, net: nn.Module) -> None:
        """Average in the weights of `net`, during `epoch` counted from 0."""
        if self.started:
            self.update(net)
        else:
            self.set(net)
        self.started = epoch >= self.warmup_epochs

    @torch.no_grad()
    def apply_update_(self, net: nn.Module, decay: float) -> None:
        average, now = self.module.state_dict(), net.state_dict()
        counters = {name: value.clone() for name, value in average.items() if name.endswith(COUNTER)}
        super().apply_update_(net, decay)
        for name, before in counters.items():
            average[name].copy_(decay * before + (1 - decay) * now[name])
