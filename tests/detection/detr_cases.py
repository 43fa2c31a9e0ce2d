"""Targets and outputs of a detector without a detector."""

from __future__ import annotations

from types import ModuleType

import torch

from adn.models.rtdetr.denoising import Denoising, make_queries


class Golden:
    """What the DETR fixtures of losses are made from."""

    def __init__(self, seeded: ModuleType, seed: int, classes: int = 80, dtype: torch.dtype = torch.float64) -> None:
        self.seeded, self.seed, self.classes, self.dtype = seeded, seed, classes, dtype

    def of(self, name: str, *shape: int, kind: str = "normal", high: int = 0) -> torch.Tensor:
        return self.seeded.seeded_input({"name": name, "shape": shape, "kind": kind, "high": high}, self.seed)

    def boxes(self, name: str, *shape: int) -> torch.Tensor:
        u = self.of(name, *shape, 4, kind="uniform").to(self.dtype)
        return torch.cat((0.15 + 0.7 * u[..., :2], 0.03 + 0.27 * u[..., 2:]), -1)

    def targets(self, counts: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{"labels": self.of(f"t{i}.labels", n, kind="int", high=self.classes),
                 "boxes": self.boxes(f"t{i}.boxes", n)} for i, n in enumerate(counts)]

    def head(self, tag: str, batch: int, queries: int, grad: bool = False) -> dict[str, torch.Tensor]:
        logits = 1.5 * self.of(f"{tag}.logits", batch, queries, self.classes).to(self.dtype) - 2
        return {"pred_logits": logits.requires_grad_(grad),
                "pred_boxes": self.boxes(f"{tag}.boxes", batch, queries).requires_grad_(grad)}


def some_targets(counts: list[int], classes: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(classes, (n,), generator=g),
             "boxes": torch.rand(n, 4, generator=g) * 0.4 + 0.1} for n in counts]


def a_head(
    batch: int, queries: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    return {"pred_logits": torch.randn(batch, queries, classes, generator=generator, dtype=dtype).requires_grad_(),
            "pred_boxes": (torch.rand(batch, queries, 4, generator=generator, dtype=dtype) * 0.4 + 0.1)
            .requires_grad_()}


def some_outputs(
    targets: list[dict[str, torch.Tensor]], queries: int = 7, classes: int = 5, layers: int = 3, seed: int = 0,
    dtype: torch.dtype = torch.float64, denoising: int = 4,
) -> dict:
    """Of a detector in training, all leaves that require grad."""
    g = torch.Generator().manual_seed(seed)
    batch = len(targets)
    outputs = {
        **a_head(batch, queries, classes, g, dtype),
        "aux_outputs": [a_head(batch, queries, classes, g, dtype) for _ in range(layers)],
        **{f"{part}_features": [torch.randn(batch, c, s, s + 1, generator=g, dtype=dtype).requires_grad_()
                                for c, s in ((3, 4), (4, 2), (5, 1))] for part in ("backbone", "encoder")},
    }
    meta = denoising_of(targets, queries, classes, denoising)
    if meta is not None:
        outputs |= {"dn_meta": meta,
                    "dn_aux_outputs": [a_head(batch, meta.queries, classes, g, dtype) for _ in range(layers)]}
    return outputs


def denoising_of(
    targets: list[dict[str, torch.Tensor]], queries: int, classes: int, num_denoising: int
) -> Denoising | None:
    return make_queries(targets, classes, queries, torch.nn.Embedding(classes + 1, 2), num_denoising=num_denoising)


def leaves(outputs: dict) -> dict[str, torch.Tensor]:
    """Every prediction and feature by name."""
    found = {}
    for name, value in outputs.items():
        if torch.is_tensor(value):
            found[name] = value
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                found |= ({f"{name}{i}.{k}": v for k, v in entry.items()} if isinstance(entry, dict) else
                          {f"{name}{i}": entry})
    return found
