"""RT-DETR objects of Hugging Face's `transformers`, as the detection task and the deploy form see them. Nothing of that
package is imported: its classes are found where the object is from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...convert import convert
from ...core.behaviours import is_frozen, original_class
from ...core.deploy import Deploy
from ...core.state import is_any_depth, state_of
from ...detect.detector import DetectorProtocol
from ...detect.targets import Targets
from ...detect.training import losses_alone
from . import STRIDE
from .criterion import DetectionLoss
from .hf import official_names
from .model import RTDETR
from .postprocess import postprocess

# Depths of the backbone's stages, and whether its blocks are basic ones, to its official name.
_BACKBONES = {((2, 2, 2, 2), "basic"): "presnet18", ((3, 4, 6, 3), "basic"): "presnet34",
              ((3, 4, 6, 3), "bottleneck"): "presnet50", ((3, 4, 23, 3), "bottleneck"): "presnet101"}


class TransformersDetector(DetectorProtocol):
    """An RT-DETR of `transformers` as the detection task sees one."""

    stride = STRIDE

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def num_classes(self) -> int:
        return self.model.config.num_labels

    def postprocess(self, outputs: Any, sizes: Sequence[Tensor | Sequence[int]]) -> list[dict[str, Tensor]]:
        return postprocess(_own_names(outputs), sizes)

    def losses(self, outputs: Any, targets: Targets) -> Tensor:
        """Those of this library's RT-DETR, of the last layer."""
        return losses_alone(DetectionLoss(), _own_names(outputs), targets)

    def distillation(self, recipe: Any, sizes: Sequence[int]) -> nn.Module:
        raise ValueError(f"a {type(self.model).__name__} is trained in the form of this library: net = adn.convert("
                         "adn.create_model(NAME)), adn.load_weights(net, model.state_dict())")

    supervised = distillation

    def deploy(self) -> Deploy:
        """The same detector of this library, any-depth if it is, with a copy of the weights.

        Raises:
            ValueError: if this library has none like it.
        """
        own = RTDETR(**self._arguments())
        if is_any_depth(self.model):
            convert(own, twins=state_of(self.model).twins)
        parameter = next(self.model.parameters())
        own.to(parameter.device, parameter.dtype).train(self.model.training)
        own.load_state_dict(official_names(self.model.state_dict()))
        return Deploy(model=own, finish=self._as_outputs)

    def _as_outputs(self, outputs: Mapping[str, Tensor]) -> Any:
        """What the model's own forward returns, of the outputs of the other: logits and boxes."""
        home = vars(sys.modules[original_class(self.model).__module__])
        kind = next(value for name, value in home.items() if name.endswith("ObjectDetectionOutput"))
        return kind(logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])

    def _arguments(self) -> dict[str, Any]:
        config = self.model.config
        backbone = config.backbone_config
        layers, width = getattr(backbone, "layer_type", ""), getattr(backbone, "embedding_size", 0)
        name = _BACKBONES.get((tuple(getattr(backbone, "depths", ())), layers))
        widths = [width * 2**i * (1 if layers == "basic" else 4) for i in range(4)]
        if config.model_type != "rt_detr" or name is None or list(backbone.hidden_sizes) != widths:
            raise ValueError(f"no deploy form of a {type(self.model).__name__}: of transformers' detectors there is "
                             "one of RTDetrForObjectDetection with a ResNet of 18, 34, 50 or 101 layers")
        return {
            "backbone": name, "backbone_args": {"width": width},
            "num_classes": config.num_labels, "queries": config.num_queries,
            "hidden": config.encoder_hidden_dim, "decoder_hidden": config.d_model,
            "heads": config.encoder_attention_heads, "feedforward": config.encoder_ffn_dim,
            "decoder_feedforward": config.decoder_ffn_dim, "expansion": config.hidden_expansion,
            "decoder_layers": config.decoder_layers, "points": config.decoder_n_points, "positions_by_rows": True,
            "freeze_norm": any(map(is_frozen, self.model.model.backbone.modules())),
        }


def _own_names(outputs: Any) -> dict[str, Tensor]:
    return {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
