"""Other people's checkpoints: reference Adaptive Depth Networks, torchvision and timm names, into each other's models.

Names are translated by tables of prefixes (below, and in `names.py` of the library's own models), which one is found by
trying: the one whose translations the net has the most of. What carries over, exactly (the same function, up to the
order of floating-point sums):

| family       | reference ADN                            | torchvision <-> timm                               |
|--------------|------------------------------------------|----------------------------------------------------|
| ResNet       | yes; `vd` to timm's with `avg_down=True` | same names                                         |
| MobileNetV2  | yes                                      | `mobilenet_v2` <-> `mobilenetv2_100`               |
| ViT          | yes                                      | `vit_b_16` <-> `vit_base_patch16_224`, ...         |
| Swin (v1)    | yes                                      | `swin_t` <-> `swin_tiny_patch4_window7_224`, ...   |
| ConvNeXt     | -                                        | `convnext_tiny` <-> `convnext_tiny`, ...           |
| RegNet       | -                                        | `regnet_y_400mf` <-> `regnety_004`, ...            |
| EfficientNet | -                                        | `efficientnet_b0` .. `b4` <-> the same names       |
| RT-DETR      | yes (AnyDepth-DETR); official as it is   | - (Hugging Face's names, older and current ones)   |
| RetinaNet    | yes (RetinaNet-ADN)                      | torchvision's detectors as they are; of its heads  |
|              |                                          | for 91 category ids the 80 that COCO has           |

Models that share names and shapes but not the function cannot be told apart by a state dict: timm's EfficientNets from
`b5` on have other epsilons than torchvision's, its `tf_*` models another padding as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from ..core.errors import CheckpointError
from ..core.state import is_any_depth, state_with_modules, unwrap
from ..models.entry import Naming, Rewrite, State
from ..models.registry import ENTRIES, LOOKS
from .checkpoint import load_tensors

Table = Mapping[str, str]

# Where training scripts put the weights; the first that is there is used. Averages first: the scripts that keep one
# evaluate it, so published numbers are those of the average.
_CONTAINERS = ("ema", "model_ema", "state_dict_ema", "model", "state_dict", "model_state_dict", "module")

# Tables that follow from the model's sizes: never read, a model keeps its own.
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")

_SHOWN = 5


@dataclasses.dataclass
class LoadReport:
    """What `load_weights` did; names are the net's own, but those left over the source's.

    Attributes:
        naming: whose names the source had.
        loaded: copied into the net.
        filled: entries of twins, absent from the source, set by the net's `twins` setting.
        unexpected: left over: in the source, without a place in the net.
        missing: in the net, not in the source; left as they were.
        mismatched: "name: shape in the source, shape in the net"; left as they were.
        ignored: counters and computed tables of the source that the net has no use for.
    """

    naming: str
    loaded: list[str] = dataclasses.field(default_factory=list)
    filled: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.unexpected or self.missing or self.mismatched)

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} loaded", f"{len(self.filled)} of twins filled"]
        counts += [f"{len(self.ignored)} not needed"] if self.ignored else []
        return "\n".join([f"{self.naming}: {', '.join(counts)}", *self.problems()])

    def problems(self) -> list[str]:
        """One line for each kind of mismatch that there is, with the first few names."""
        kinds = {"of other shape": self.mismatched, "missing": self.missing, "left over": self.unexpected}
        return [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
                for kind, names in kinds.items() if names]


def load_weights(net: nn.Module, source: str | os.PathLike[str] | State, *, strict: bool = True) -> LoadReport:
    """Load weights that were not written by `save`: of the plain model, or any-depth ones of the reference.

    Recognised are this library's names, those of the reference implementations (`*_skip`, `*_skippable` twins),
    torchvision's and timm's, for timm's and torchvision's models, and those of RT-DETR; see the table above. Twins that
    the source does not have are filled by the `twins` setting of the net ("fresh": reset; else from the plain norm).
    Absent counters and tables that follow from the model's sizes are no mismatch.

    Args:
        net: a converted net, or a model not converted.
        source: a file (`.pth`, `.pt`, `.pth.tar`: read without running code; `.safetensors`), or a state dict. Either
            may hold it under a key of training scripts ("model", "state_dict", ...; averaged weights, "ema", ..., are
            taken where there are any), with the prefixes of DDP and torch.compile.
        strict: False loads what fits and reports the rest; True refuses any mismatch of names or shapes.

    Returns:
        What was loaded, filled and left over; prints well.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a deploy form: load into the net that it was made from.
        CheckpointError: if it cannot be read, or does not fit (with `strict=False`: if nothing of it does), or has
            twins for only some of the norms that need one. The net is left untouched.
    """
    inner, norms = net, []
    if is_any_depth(net):
        inner = unwrap(net)
        norms = [norm for stage in state_with_modules(net).plan.flagged for norm in stage.norms]
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    given = _unwrapped(source if isinstance(source, Mapping) else _read(Path(source)), where)
    own = inner.state_dict()
    report, chosen = _fit(_without_prefixes(given, own), own, norms)
    if not report.loaded:
        raise CheckpointError(f"nothing in {where} fits this {type(inner).__name__}: it has {len(given)} entries, such "
                              f"as {_some(given)}, where the net has {_some(own)}{_looks_like(given)}")
    if strict and not report.complete:
        hint = ""
        if not norms and any(".skip." in name for name in report.unexpected):
            hint = "\nThese are weights of an any-depth net: convert the model first (adn.convert)"
        elif 8 * len(report.mismatched) > len(given):
            hint = "\nMost names are this net's, many shapes are not: is it another size of the same model?"
        elif not report.missing and not report.unexpected:
            hint = "\nstrict=False loads the rest, e.g. to train another head; of adn train it is --new-head"
        if 2 * (len(report.loaded) + len(report.mismatched)) < len(given):
            hint += _looks_like(given)
        raise CheckpointError("\n".join([
            f"{where} does not fit this {type(inner).__name__} ({report.naming}, {len(report.loaded)} of {len(given)} "
            "entries do):", *report.problems()]) + hint)
    load_tensors(inner, chosen, strict=False)
    return report


def _some(state: State) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in [*state.items()][:3])


# What a state dict is of, by a name in it; after those of this library's own models.
_TELLTALES = (
    (r"\bblocks\.0\.attn\.qkv\.", "a vision transformer of timm"),
    (r"\bencoder\.layers\.encoder_layer_0\.", "a vision transformer of torchvision"),
    (r"\battention\.(attention\.query|q_proj)\.", "a vision transformer of Hugging Face's transformers"),
    (r"\blayer4\.\d", "a ResNet"),
)


def _looks_like(given: State) -> str:
    found = (what for pattern, what in (*LOOKS, *_TELLTALES) if any(re.search(pattern, name) for name in given))
    return next((f"\nIts names are those of {what}" for what in found), "")


def _fit(given: State, own: State, norms: Iterable[str]) -> tuple[LoadReport, dict[str, torch.Tensor]]:
    """Compare translated names and shapes with the net's: the report, and what is to be copied."""
    for author, rewrite in _rewrites():
        if (rewritten := rewrite(given, own)) is not None:
            given, rewriter = rewritten, author
            break
    else:
        rewriter = ""
    naming, names = _translate(given, own)
    naming = rewriter or naming
    report, chosen = LoadReport(naming), {}
    for name, (source_name, tensor) in zip(names, given.items(), strict=True):
        if name.rpartition(".")[2] in _COMPUTED or (name not in own and not tensor.is_floating_point()):
            report.ignored.append(source_name)
        elif name not in own:
            report.unexpected.append(name if ".skip." in name else source_name)
        elif tensor.shape == own[name].shape:
            chosen[name] = tensor
        elif name != source_name and tensor.squeeze().shape == own[name].squeeze().shape:
            chosen[name] = tensor.reshape(own[name].shape)  # a layer scale per channel, a 1x1 convolution
        else:
            report.mismatched.append(f"{name}: {tuple(tensor.shape)} given, {tuple(own[name].shape)} in the net")
    report.loaded = list(chosen)
    twins = {f"{norm}.skip.{key}": f"{norm}.{key}" for norm in norms
             for key in (name[len(norm) + 6 :] for name in own if name.startswith(f"{norm}.skip."))}
    known = set(names)
    if not known & twins.keys():
        whole = {norm for norm in norms if all(
            plain in chosen for twin, plain in twins.items()
            if twin.startswith(f"{norm}.skip.") and own[twin].is_floating_point())}
        report.filled = [twin for twin, plain in twins.items()
                         if plain in chosen and twin.rpartition(".skip.")[0] in whole]
        known |= twins.keys()
    report.missing = [name for name, tensor in own.items() if name not in known and tensor.is_floating_point()
                      and name.rpartition(".")[2] not in _COMPUTED]
    return report, chosen


# ----------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Mapping:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; pass the file in it that holds the weights") from None
    if start[8:9] == b"{":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    if not start.startswith((b"PK", b"\x80")):
        what = f"begins with {start[:24]!r}" if start else "is empty"
        raise CheckpointError(f"{path} is no checkpoint of torch.save or safetensors: it {what}")
    try:
        # torchvision's and the reference's training scripts store their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"(?i)unsupported (?:global|class)\S* (?:GLOBAL )?(\S+)", str(error)):
            how = "load it yourself and pass the state dict: adn.load_weights(net, torch.load(path, " \
                "weights_only=False)[...])"
            if refused[1].startswith("ultralytics."):  # a whole model
                how = "export its weights with the package that made it: torch.save(ultralytics.YOLO(path).model." \
                    "float().state_dict(), 'weights.pth')"
            raise CheckpointError(f"{path} holds pickled code ({refused[1]}), which is not run. If you trust it, {how}"
                                  ) from error
        raise CheckpointError(f"{path} is damaged, or no checkpoint of torch.save") from error
    # A damaged file fails at whatever its first wrong length or instruction makes the reader do.
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
            struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or cut short ({reason})") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a state dict")
    return value


def _unwrapped(value: Mapping, where: str) -> dict[str, torch.Tensor]:
    """The state dict in what a training script stored."""
    while inner := next((value[key] for key in _CONTAINERS if isinstance(value.get(key), Mapping)), None):
        value = inner
    state = {str(key): tensor for key, tensor in value.items() if torch.is_tensor(tensor)}
    if not state:
        raise CheckpointError(f"{where} holds no weights; its keys are {', '.join(map(str, value)) or 'none'}"[:500])
    return state


def _without_prefixes(state: State, own: State) -> dict[str, torch.Tensor]:
    """Names without what DDP (or an average) and torch.compile put before them."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while any(name.startswith("module.") for name in state) and not any(name.startswith("module.") for name in own):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


# ------------------------------------------------------------------------------------------------------------- names


def _translate(given: Iterable[str], own: State) -> tuple[str, list[str]]:
    """Whose names these are, and what the net calls each; the names as they are if it has none of them."""
    given = list(given)
    ours = [re.sub(r"_skip(?:pable)?\.", ".skip.", name) for name in given]
    reference = ours != given
    naming = "reference" if reference else "adn" if any(".skip." in name for name in given) else "plain names"
    best, hits = ours, len(own.keys() & set(ours))
    for author, family, tables in _translations():
        names = ours
        for table in tables:
            names = [_rename(name, table) for name in names]
        found = len(own.keys() & set(names))
        if found > hits and len(set(names)) == len(names):
            best, naming, hits = names, f"{'reference' if reference else author} {family}", found
    return (naming if hits else "unknown names"), best


def _rename(name: str, table: Table) -> str:
    """Replace the longest prefix (of whole components) that the table knows."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return name


@functools.cache
def _translations() -> list[Naming]:
    """Every way a checkpoint may be named."""
    to_timm, reference = _torchvision_to_timm(), _reference_to_torchvision()
    found: list[Naming] = []
    for family, table in to_timm.items():
        found.append(("torchvision", family, (table,)))
        found.append(("timm", family, ({new: old for old, new in table.items()},)))
    # After these: a table of the reference's names lets most of torchvision's pass as they are.
    for family, table in reference.items():
        found += [("reference", family, (table,)), ("reference", family, (table, to_timm[family]))]
    return [*found, *{family: (author, family, tables)
                      for entry in ENTRIES.values() for author, family, tables in entry.names}.values()]


@functools.cache
def _rewrites() -> list[Rewrite]:
    return [*dict.fromkeys(rewrite for entry in ENTRIES.values() for rewrite in entry.rewrites)]


_MOST_BLOCKS = 64  # of a stage; tables are written out so that they can be turned round

# (stage, block) of torchvision's `features.1`, `features.2`, ... `features.17`.
_MOBILENETV2 = [(stage, block) for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(count)]


def _table(outside: Table, *inside: tuple[Iterable[tuple[str, str]], Table]) -> Table:
    """Prefixes outside of blocks, then for each kind of block its places and its parts; "" is the block itself."""
    rows = dict(outside)
    for places, parts in inside:
        for old, new in places:
            rows.update({f"{old}.{a}" if a else old: f"{new}.{b}" if b else new for a, b in parts.items()})
    return rows


def _torchvision_to_timm() -> dict[str, Table]:
    linear = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    depthwise = {"0.0": "conv_dw", "0.1": "bn1", "1.fc1": "se.conv_reduce", "1.fc2": "se.conv_expand",
                 "2.0": "conv_pw", "2.1": "bn2"}
    inverted = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2.fc1": "se.conv_reduce",
                "2.fc2": "se.conv_expand", "3.0": "conv_pwl", "3.1": "bn3"}
    return {
        "MobileNetV2": _table(
            {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2",
             "classifier.1": "classifier"},
            ([("features.1.conv", "blocks.0.0")], {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}),
            ([(f"features.{i}.conv", f"blocks.{s}.{b}") for i, (s, b) in enumerate(_MOBILENETV2, 1) if s],
             {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}),
        ),
        "ViT": _table(
            {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
             "encoder.ln": "norm", "heads.head": "head"},
            ([(f"encoder.layers.encoder_layer_{b}", f"blocks.{b}") for b in range(_MOST_BLOCKS)],
             {"ln_1": "norm1", "ln_2": "norm2", "self_attention.in_proj_weight": "attn.qkv.weight",
              "self_attention.in_proj_bias": "attn.qkv.bias", "self_attention.out_proj": "attn.proj", **linear}),
        ),
        "Swin": _table(
            {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm", "head": "head.fc",
             **{f"features.{2 * s}": f"layers.{s}.downsample" for s in (1, 2, 3)}},
            ([(f"features.{2 * s + 1}.{b}", f"layers.{s}.blocks.{b}") for s in range(4) for b in range(_MOST_BLOCKS)],
             {"": "", **linear}),
        ),
        "ConvNeXt": _table(
            {"features.0": "stem", "classifier.0": "head.norm", "classifier.2": "head.fc",
             **{f"features.{2 * s}": f"stages.{s}.downsample" for s in (1, 2, 3)}},
            ([(f"features.{2 * s + 1}.{b}", f"stages.{s}.blocks.{b}") for s in range(4) for b in range(_MOST_BLOCKS)],
             {"layer_scale": "gamma", "block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1",
              "block.5": "mlp.fc2"}),
        ),
        "RegNet": _table(
            {"stem.0": "stem.conv", "stem.1": "stem.bn", "fc": "head.fc"},
            ([(f"trunk_output.block{s}.block{s}-{b}", f"s{s}.b{b + 1}")
              for s in range(1, 5) for b in range(_MOST_BLOCKS)],
             {"proj.0": "downsample.conv", "proj.1": "downsample.bn", "f.se": "se",
              **{f"f.{letter}.{i}": f"conv{n}.{part}" for n, letter in enumerate("abc", 1)
                 for i, part in enumerate(("conv", "bn"))}}),
        ),
        "EfficientNet": _table(
            {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.8.0": "conv_head", "features.8.1": "bn2",
             "classifier.1": "classifier"},
            ([(f"features.1.{b}.block", f"blocks.0.{b}") for b in range(_MOST_BLOCKS)], depthwise),
            ([(f"features.{s + 1}.{b}.block", f"blocks.{s}.{b}") for s in range(1, 7) for b in range(_MOST_BLOCKS)],
             inverted),
        ),
    }


def _reference_to_torchvision() -> dict[str, Table]:
    return {
        "MobileNetV2": _table(
            {"features.0.conv_layer": "features.0.0", "features.0.norm": "features.0.1",
             "features.8.conv_layer": "features.18.0", "features.8.norm": "features.18.1"},
            ([("features.1.conv", "features.1.conv")],
             {"0.conv_layer": "0.0", "0.norm": "0.1", "1.conv_layer": "1", "1.norm": "2"}),
            ([("features.7.conv", "features.17.conv"),
              *((f"features.{s + 1}.{b}.conv", f"features.{i}.conv")
                for i, (s, b) in enumerate(_MOBILENETV2, 1) if 0 < s < 6)],
             {"0.conv_layer": "0.0", "0.norm": "0.1", "1.conv_layer": "1.0", "1.norm": "1.1", "2.conv_layer": "2",
              "2.norm": "3"}),
        ),
        "Swin": _table(
            {"pre.0": "features.0.0", "pre.2": "features.0.2",
             **{f"features.{i}": f"features.{i + 1}" for i in range(7)}}
        ),
    }
