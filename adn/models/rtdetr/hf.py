"""RT-DETR as Hugging Face's `transformers` names it: its state dict in official names. Nothing of that package is
imported."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# Applied in turn. Files on the hub use older names than the package does now; both are here.
_RULES = [(re.compile(pattern), new) for pattern, new in (
    (r"^backbone\.model\.embedder\.embedder\.(\d)\.", lambda m: f"backbone.conv1.conv1_{int(m[1]) + 1}."),
    (r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d)\.",
     lambda m: f"backbone.res_layers.{m[1]}.blocks.{m[2]}.branch2{'abc'[int(m[3])]}."),
    (r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.1\.",
     r"backbone.res_layers.\1.blocks.\2.short.conv."),
    (r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.",
     r"backbone.res_layers.\1.blocks.\2.short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^encoder_input_proj\.", "encoder.input_proj."),
    (r"^decoder_input_proj\.(\d)\.0\.", r"decoder.input_proj.\1.conv."),
    (r"^decoder_input_proj\.(\d)\.1\.", r"decoder.input_proj.\1.norm."),
    (r"^encoder\.aifi\.", "encoder.encoder."),
    (r"^decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^decoder\.layers\.", "decoder.decoder.layers."),
    (r"^(enc_|denoising)", r"decoder.\1"),
    (r"^(decoder\.decoder\.layers\.\d+\.)encoder_attn_layer_norm\.", r"\1norm2."),
    (r"^(decoder\.decoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm3."),
    (r"^(decoder\.decoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"^(decoder\.decoder\.layers\.\d+\.)encoder_attn\.", r"\1cross_attn."),
    (r"^(encoder\.encoder\.\d+\.layers\.\d+\.)final_layer_norm\.", r"\1norm2."),
    (r"^(encoder\.encoder\.\d+\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"\.(?:mlp\.)?fc(\d)\.", r".linear\1."),
    (r"\.o_proj\.", ".out_proj."),
)]
_PROJECTION = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)")


def official_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """A state dict of `RTDetrForObjectDetection` or `RTDetrModel` in official names; None if it is none."""
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if not any(name.startswith("encoder_input_proj.") for name in bare):
        return None
    renamed: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in bare.items():
        if re.match(r"(class|bbox)_embed\.", name):
            continue  # those of the decoder by another name
        if found := _PROJECTION.fullmatch(name):
            parts.setdefault(f"{_official(found[1])}in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            renamed[_official(name)] = tensor
    complete = {name: torch.cat([given[letter] for letter in "qkv"])
                for name, given in parts.items() if len(given) == 3}
    return renamed | complete


def _official(name: str) -> str:
    for pattern, new in _RULES:
        name = pattern.sub(new, name)
    return name
