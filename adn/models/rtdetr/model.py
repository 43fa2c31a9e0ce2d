"""RT-DETR (Zhao et al., CVPR 2024, arXiv:2304.08069), which `adn.convert` makes AnyDepth-DETR."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import timm.layers
import torch
from torch import Tensor, fx, nn

from ...core.behaviours import FROZEN_NORMS
from ...core.regions import only_calls, unseen
from ...core.state import state_of
from ...detect.detector import Detector, checked
from ...detect.targets import Targets, fitting
from ...detect.training import losses_alone
from . import STRIDE
from .criterion import DetectionLoss, DistillationLoss
from .decoder import Decoder
from .denoising import Denoising, Draws, make_queries
from .distill import DetectionDistillation, DetectionSupervised
from .encoder import HybridEncoder
from .postprocess import postprocess
from .presnet import PResNet
from .recipes import DetectionRecipe


class RTDETR(Detector):
    """A detector: images (B, 3, H, W), RGB in 0..1, sides multiples of 32, to a set of objects.

    In evaluation a dict: `pred_logits` (B, Q, C) before the sigmoid, `pred_boxes` (B, Q, 4) as (cx, cy, w, h) in 0..1,
    `query_index` int64 (B, Q), the token of the flattened maps that each query came from.

    In training the same, and: `aux_outputs`, such dicts of the earlier decoder layers, then of the encoder's heads;
    where an image has an object, `dn_aux_outputs`, of the denoising queries, one for each layer, and `dn_meta`, their
    `Denoising`; `backbone_features` and `encoder_features`, lists of three maps.

    Args:
        backbone: "presnet18", 34, 50 or 101, the official ones; or a model of timm, of which the maps of strides 8, 16
            and 32 are used.
        num_classes: C.
        queries: Q.
        hidden: channels of the neck.
        decoder_hidden: width of the decoder.
        heads: of all attention.
        feedforward, decoder_feedforward: hidden width of the neck's and of the decoder's perceptrons.
        expansion, depth_mult: of the neck's CSP blocks.
        decoder_layers, points: layers of the decoder; points that a query looks at, per map and head.
        num_denoising, label_noise, box_noise: of the denoising queries in training, see `make_queries`.
        freeze_norm: norms of the backbone keep statistics and parameters.
        freeze_stem: what comes before the backbone's stages keeps its parameters.
        positions_by_rows: on images that are not square, tell tokens their places as Hugging Face's code does: for
            weights that were trained with it on such images. Its published ones were trained with the official code.
        backbone_args: further arguments of the backbone.

    Raises:
        ValueError: on sizes that make no detector; of a call, on images of another shape or type.
    """

    stride = STRIDE
    postprocess = staticmethod(postprocess)
    class_heads = ("decoder.enc_score_head", "decoder.dec_score_head", "decoder.denoising_class_embed")

    def __init__(
        self,
        backbone: str = "presnet50",
        *,
        num_classes: int = 80,
        queries: int = 300,
        hidden: int = 256,
        decoder_hidden: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        decoder_feedforward: int = 1024,
        expansion: float = 1.0,
        depth_mult: float = 1.0,
        decoder_layers: int = 6,
        points: int = 4,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        freeze_norm: bool = False,
        freeze_stem: bool = False,
        positions_by_rows: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_counts(num_classes=num_classes, queries=queries, heads=heads, decoder_layers=decoder_layers,
                      points=points)
        if hidden % heads or decoder_hidden % heads:
            raise ValueError(f"widths of {hidden} and {decoder_hidden} for {heads} heads; pass multiples of the heads")
        self.num_classes = num_classes
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise
        self.backbone, channels = _backbone(backbone, dict(backbone_args or {}))
        self.encoder = HybridEncoder(channels, hidden, heads, feedforward, expansion, depth_mult,
                                     positions_by_rows)
        self.decoder = Decoder([hidden] * 3, num_classes, queries, decoder_hidden, heads, decoder_layers,
                               decoder_feedforward, points)
        if freeze_norm:
            self.backbone = timm.layers.freeze_batch_norm_2d(self.backbone)
        if freeze_stem:
            _freeze_stem(self.backbone)

    @only_calls
    def forward(self, images: Tensor, targets: Targets | None = None, draws: Draws | torch.Generator | None = None
                ) -> dict[str, Any]:
        """
        Args:
            targets: of the images, in training: one dict each with `labels` int64 (n,) and `boxes` (n, 4); None = no
                denoising.
            draws: the random numbers of denoising, see `make_queries`.
        """
        images = _enough(checked(images, STRIDE), self.decoder.queries)
        features = self.backbone(images)
        maps = self.encoder(features)
        if not self.training:
            return self.decoder(maps)
        denoising = None if targets is None else self._denoising(targets, len(images), draws)
        outputs = {**self.decoder(maps, denoising), "backbone_features": list(features), "encoder_features": maps}
        # Here, not by the decoder: compiled, that would be for the objects of one batch.
        return outputs if denoising is None else outputs | {"dn_meta": denoising}

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.decoder.reset_classifier(num_classes)

    def losses(self, outputs: Mapping[str, Any], targets: Targets) -> Tensor:
        """Of the last layer that runs."""
        return losses_alone(DetectionLoss(), outputs, targets)

    def comparable(self, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
                   ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """By query: which of two with nearly the same score comes first, or is the last that is taken, is a matter of
        rounding. Where more than one in fifty is not in both, they are left as they are."""
        image, mine, other = (given["query_index"][:, :, None] == wanted["query_index"][:, None]).nonzero().unbind(1)
        if len(image) < 0.98 * wanted["query_index"].numel():
            return given, wanted
        return ({name: value[image, mine] for name, value in given.items()},
                {name: value[image, other] for name, value in wanted.items()})

    def supervised(self, _recipe: DetectionRecipe, sizes: Sequence[int]) -> nn.Module:
        return DetectionSupervised(self, multi_scale=sizes)

    def distillation(self, recipe: DetectionRecipe, sizes: Sequence[int]) -> nn.Module:
        for cut in state_of(self).cuts:
            cut.in_training = recipe.cut_decoder
        return DetectionDistillation(self, distillation=DistillationLoss(class_kl=recipe.class_kl), multi_scale=sizes)

    def warning(self) -> str | None:
        frozen = sum(not p.requires_grad for p in self.backbone.parameters())
        frozen += sum(isinstance(module, FROZEN_NORMS) for module in self.backbone.modules())
        return ("parts of the backbone are frozen at the random values they start with; begin with --backbone, "
                "--weights or --checkpoint, or train them, too: --model-kwargs "
                """'{"freeze_norm": false, "freeze_stem": false}'""") if frozen else None

    @torch.compiler.disable
    def _denoising(self, targets: Targets, images: int, draws: Draws | torch.Generator | None) -> Denoising | None:
        return make_queries(
            fitting(targets, images), self.num_classes, self.decoder.queries, self.decoder.denoising_class_embed,
            num_denoising=self.num_denoising, label_noise_ratio=self.label_noise, box_noise_scale=self.box_noise,
            draws=draws)


fx.wrap("checked")


@fx.wrap
@unseen
def _enough(images: Tensor, queries: int) -> Tensor:
    """The images, if they have places for so many queries."""
    h, w = images.shape[-2:]
    tokens = sum((h // stride) * (w // stride) for stride in (8, 16, 32))
    if tokens < queries:
        raise ValueError(f"images of {w} x {h} pixels have {tokens} places for {queries} queries: pass larger images, "
                         "or build the detector with fewer queries")
    return images


def _backbone(name: str, args: dict[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    if re.fullmatch(r"presnet\d+", name):
        net = PResNet(int(name.removeprefix("presnet")), **args)
        return net, net.channels
    if not timm.is_model(name):
        raise ValueError(f"no backbone {name!r}: pass presnet18, 34, 50 or 101, or a model of timm")
    net = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1), **args)
    if tuple(net.feature_info.reduction()) != (8, 16, 32):
        raise ValueError(f"the last maps of {name} have strides {net.feature_info.reduction()}, not 8, 16 and 32")
    if getattr(net, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"the maps of {name} have their channels last, (B, H, W, C); pass another backbone")
    return net, net.feature_info.channels()


def _freeze_stem(backbone: nn.Module) -> None:
    stem = [module for name, module in backbone.named_children() if re.match("conv1|bn1|stem|conv_stem", name)]
    if not stem:
        raise ValueError(f"the stem of this {type(backbone).__name__} is not known (its children are "
                         f"{', '.join(name for name, _ in backbone.named_children())}); pass freeze_stem=False")
    for module in stem:
        module.requires_grad_(False)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}; pass at least 1")
