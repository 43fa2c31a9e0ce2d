"""Writes the layers that `adn_kernels.tune` measures: those of `shapes.py`, without what only benchmarks need.

    python bench/tuned_layers.py
"""

from __future__ import annotations

import json
from typing import Any

from shapes import NETWORKS, Conv, LayerNorm, Linear, Norm, layers

from adn_kernels.tune import LAYERS


def fields(layer: Any) -> dict[str, list]:
    """Kind and arguments of the layer in `adn_kernels.tune`; nothing of a kind that is not tuned by layers."""
    match layer:
        case Conv():
            return {"Conv": [layer.inputs, layer.channels, layer.side, layer.kernel, layer.stride, layer.groups,
                             layer.activation, layer.residual]}
        case Norm():
            return {"Norm": [layer.channels, layer.side, layer.activation, layer.residual]}
        case LayerNorm():
            return {"Tokens": [layer.rows, layer.channels, 0, "identity", layer.residual]}
        case Linear():
            return {"Tokens": [layer.rows, layer.inputs, layer.channels, layer.activation, layer.residual]}
    return {}


def text() -> str:
    """One layer a line, each once in its network."""
    networks = []
    for network in NETWORKS:
        lines = dict.fromkeys(json.dumps(fields(layer)) for layer in layers(network) if fields(layer))
        networks.append(f'"{network}": [\n' + ",\n".join(lines) + "\n]")
    return "{\n" + ",\n".join(networks) + "\n}\n"


if __name__ == "__main__":
    LAYERS.write_text(text())
