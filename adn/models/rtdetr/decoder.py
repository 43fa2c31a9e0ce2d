"""The decoder of RT-DETR: the best tokens of the three maps become queries, which transformer layers refine one after
the other into objects. Official names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...detect.boxes import inverse_sigmoid
from .deformable import DeformableAttention
from .denoising import Denoising
from .layers import MLP, ConvNorm, Tables

Shapes = tuple[tuple[int, int], ...]

# Side of a token's anchor on the finest map, as a part of the image; twice that on each coarser one.
_ANCHOR = 0.05
_PRIOR = 0.01
_MARGIN = 0.01  # an anchor with a centre or a side closer than this to 0 or to 1 is not used


class DecoderLayer(nn.Module):
    """Self-attention between queries, deformable attention to the maps, perceptron; each followed by its norm."""

    def __init__(self, dim: int, heads: int, feedforward: int, levels: int, points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, heads, levels, points)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes,
                mask: Tensor | None = None) -> Tensor:
        """Queries (B, Q, dim), what tells them their place (B, Q, dim), their boxes (B, Q, 4), tokens (B, L, dim)."""
        q = x + position
        x = self.norm1(x + self.self_attn(q, q, x, attn_mask=mask, need_weights=False)[0])
        x = self.norm2(x + self.cross_attn(x + position, reference.unsqueeze(2), memory, shapes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayers(nn.Module):
    def __init__(self, layers: int, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))


class Anchors(Tables):
    """The box that each token starts from, before the sigmoid: (1, L, 4), inf for tokens that are not used; and which
    are: bool (1, L, 1). At least float32, as all that follows from them."""

    def forward(self, shapes: Shapes, memory: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple((int(h), int(w)) for h, w in shapes)
        wide = torch.promote_types(memory.dtype, torch.float32)
        return self.kept(shapes, memory.device, wide, lambda: self.table(shapes))

    def table(self, shapes: Shapes) -> tuple[Tensor, Tensor]:
        levels = []
        for level, (h, w) in enumerate(shapes):
            y, x = torch.meshgrid(torch.arange(h, dtype=torch.float32), torch.arange(w, dtype=torch.float32),
                                  indexing="ij")
            side = torch.full_like(x, _ANCHOR * 2.0**level)
            levels.append(torch.stack([(x + 0.5) / w, (y + 0.5) / h, side, side], -1).flatten(0, 1))
        anchors = torch.cat(levels)[None]
        valid = ((anchors > _MARGIN) & (anchors < 1 - _MARGIN)).all(-1, keepdim=True)
        return torch.log(anchors / (1 - anchors)).masked_fill(~valid, math.inf), valid


class Queries(NamedTuple):
    """What the layers start from, and what the encoder's own heads say of it.

    Attributes:
        content: (B, Q, dim), without gradient.
        box_unact: (B, Q, 4) boxes before the sigmoid, without gradient.
        index: int64 (B, Q), the token each comes from.
        outputs: `pred_logits`, `pred_boxes` of the encoder's heads, for its loss.
    """

    content: Tensor
    box_unact: Tensor
    index: Tensor
    outputs: dict[str, Tensor]


class Decoder(nn.Module):
    """Three maps (B, C, H, W) to objects.

    Args:
        channels: of each map.
        num_classes, queries: C and Q.
        dim, heads, layers, feedforward, points: of the layers.
    """

    def __init__(self, channels: Sequence[int], num_classes: int = 80, queries: int = 300, dim: int = 256,
                 heads: int = 8, layers: int = 6, feedforward: int = 1024, points: int = 4) -> None:
        super().__init__()
        self.queries = queries
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, 1) for c in channels)
        self.decoder = DecoderLayers(layers, dim, heads, feedforward, len(channels), points)
        self.query_pos_head = MLP(4, 2 * dim, dim, 2)
        self.anchors = Anchors()
        self.enc_output = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.enc_bbox_head = MLP(dim, dim, 4, 3)
        self.dec_bbox_head = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(layers))
        for head in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for linear in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(linear.weight)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for so many classes, that at first find each with a probability of 1 %."""
        dim, like = self.enc_output[0].out_features, self.enc_output[0].weight
        self.num_classes = num_classes
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes).to(like)
        self.enc_score_head = nn.Linear(dim, num_classes).to(like)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes).to(like) for _ in self.dec_bbox_head)
        for head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(head.bias, -math.log((1 - _PRIOR) / _PRIOR))
        for module in (self.denoising_class_embed, self.enc_score_head, self.dec_score_head):
            module.train(self.training)

    def running(self) -> int:
        """How many layers run."""
        return len(self.decoder.layers)

    def forward(self, maps: Sequence[Tensor], denoising: Denoising | None = None) -> dict[str, Any]:
        """In evaluation the objects of the last layer that runs; in training of all, see `RTDETR`."""
        memory, shapes = self.tokens(maps)
        queries = self.select(memory, shapes)
        if self.training:
            return self._train(memory, shapes, queries, denoising)
        x, boxes = queries.content, queries.box_unact.sigmoid()
        last = self.running() - 1
        for i in range(last + 1):
            x = self._layer(i, x, boxes, memory, shapes)
            boxes = torch.sigmoid(self.dec_bbox_head[i](x) + inverse_sigmoid(boxes))
        return {"pred_logits": self.dec_score_head[last](x), "pred_boxes": boxes, "query_index": queries.index}

    def per_image(self, maps: Sequence[Tensor], layers: Tensor) -> dict[str, Tensor]:
        """In evaluation, for each image the objects of the layer that it stops at.

        Args:
            layers: int (B,), on the device of the maps: 1 is the first. All layers run.
        """
        memory, shapes = self.tokens(maps)
        queries = self.select(memory, shapes)
        x, boxes = queries.content, queries.box_unact.sigmoid()
        layers = layers.reshape(-1, 1, 1)
        found = None
        for i in range(len(self.decoder.layers)):
            x = self._layer(i, x, boxes, memory, shapes)
            boxes = torch.sigmoid(self.dec_bbox_head[i](x) + inverse_sigmoid(boxes))
            now = self.dec_score_head[i](x), boxes
            found = now if found is None else [torch.where(layers > i, a, b) for a, b in zip(now, found)]
        return {"pred_logits": found[0], "pred_boxes": found[1], "query_index": queries.index}

    def tokens(self, maps: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """(B, L, dim): those of all maps, row by row, and the sizes of the maps."""
        projected = [project(maps[i]) for i, project in enumerate(self.input_proj)]
        shapes = tuple((x.shape[2], x.shape[3]) for x in projected)
        return torch.cat([x.flatten(2).transpose(1, 2) for x in projected], dim=1), shapes

    def select(self, memory: Tensor, shapes: Shapes) -> Queries:
        """The tokens with the highest score of any class, and the boxes the encoder's head puts there."""
        anchors, valid = self.anchors(shapes, memory)
        features = self.enc_output(memory * valid.to(memory.dtype))
        logits = self.enc_score_head(features)
        boxes = self.enc_bbox_head(features) + anchors
        index = logits.max(-1).values.topk(self.queries, dim=1).indices
        content, logits, boxes = (_rows(x, index) for x in (features, logits, boxes))
        return Queries(content.detach(), boxes.detach(), index, {"pred_logits": logits, "pred_boxes": boxes.sigmoid()})

    def _layer(self, i: int, x: Tensor, boxes: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None = None
               ) -> Tensor:
        return self.decoder.layers[i](x, self.query_pos_head(boxes.to(x.dtype)), boxes, memory, shapes, mask)

    def _train(self, memory: Tensor, shapes: Shapes, queries: Queries, denoising: Denoising | None) -> dict[str, Any]:
        x, reference, mask, extra = queries.content, queries.box_unact, None, 0
        if denoising is not None:
            x = torch.cat([denoising.content.to(x.dtype), x], dim=1)
            reference = torch.cat([denoising.box_unact.to(reference.dtype), reference], dim=1)
            mask, extra = denoising.attn_mask, denoising.queries
        reference = reference.sigmoid()
        boxes: Tensor | None = None
        outputs = []
        for i in range(self.running()):
            x = self._layer(i, x, reference, memory, shapes, mask)
            delta = self.dec_bbox_head[i](x)
            # The loss of a layer also reaches the box of the layer before ("look forward twice").
            start = reference if boxes is None else boxes
            outputs.append({"pred_logits": self.dec_score_head[i](x),
                            "pred_boxes": torch.sigmoid(delta + inverse_sigmoid(start))})
            boxes = torch.sigmoid(delta + inverse_sigmoid(reference))
            reference = boxes.detach()
        ordinary = [{name: value[:, extra:] for name, value in output.items()} for output in outputs]
        result: dict[str, Any] = {**ordinary[-1], "query_index": queries.index,
                                  "aux_outputs": [*ordinary[:-1], queries.outputs]}
        if denoising is not None:
            result["dn_aux_outputs"] = [{name: value[:, :extra] for name, value in output.items()}
                                        for output in outputs]
        return result


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, L, C) at int64 (B, Q): (B, Q, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
