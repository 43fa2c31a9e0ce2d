"""Swin transformers of Hugging Face's `transformers`, v1 and v2, known by the names of their classes; nothing of it is
imported. As for those of timm and torchvision."""

from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, norms_named, runs, transition_norms

_BLOCKS = ("SwinLayer", "Swinv2Layer")


@family()
def transformers_swin(model: nn.Module) -> list[StagePlan]:
    blocks = tuple({type(m) for m in model.modules() if type(m).__name__ in _BLOCKS and hasattr(m, "layernorm_before")})
    stages = list(runs(model, blocks, lambda block: True)) if blocks else []
    for stage in stages:
        stage.channel_dim = -1
        stage.extras = 1  # weights of attention
        stage.norms = norms_named(model, stage, ("layernorm_before", "layernorm_after"))
    for norm, before, after in transition_norms(model, stages):
        if before is not None and after is not None and after.has_flag:
            after.norms.append(norm)
    return stages
