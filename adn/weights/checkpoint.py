"""Files of converted nets: safetensors plus what is needed to rebuild the net. No pickle: loading runs no code.

The file holds the net's state dict, and under the metadata key "adn" a JSON object: `format` (of this description),
`adn` and `timm` (versions that wrote it), `origin` (timm name and arguments, or null), `plan`, `depth`, `twins`,
`class_names`, `extra`; of a routed net also `routing`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..convert import convert, detach
from ..core.errors import CheckpointError, ConversionError
from ..core.files import atomic_write
from ..core.plan import Plan
from ..core.state import get_depth, set_depth, state_of, state_with_modules, unwrap
from ..models.registry import PREFIX, build_source

FORMAT = 1
_KEY = "adn"
_ROUTER = "adn_router."  # what names of a router begin with
_FIELDS = ("format", "adn", "timm", "origin", "plan", "depth", "twins", "class_names", "extra")


def save(net: nn.Module, path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None,
         extra: Mapping[str, Any] | None = None) -> None:
    """Write a converted net to one safetensors file, atomically: whatever happens, `path` holds a whole file.

    A net of `create_model` can be rebuilt by `load` from the file alone, and so can an unaltered timm model that
    was converted by hand: both are checked here. For any other net `load` needs the model passed.

    Args:
        net: the net, or DDP or `torch.compile` around it, on any device; or a `adn.routing.RoutedNet`, which is stored
            with its router, depths and policy.
        path: the file; its folder must exist. An existing file is replaced once the new one is complete.
        class_names: the labels of the classes; None = those the net has, if any.
        extra: anything else worth keeping that JSON can hold, returned by `read_metadata`.

    Raises:
        ValueError: on a net not converted, weights that are not plain tensors (quantised ones), a number of class
            names that is not the number of classes, or an `extra` that is no JSON.
        OSError: if the file cannot be written (full disk, missing or unwritable folder); a former file is intact.
    """
    from .. import __version__

    routing, router = None, {}
    if hasattr(net, "routing_to_dict"):
        net, routing, router = net.routing_to_dict()
    inner, state = unwrap(net), state_with_modules(net)
    names = state.class_names if class_names is None else list(class_names)
    classes = getattr(inner, "num_classes", None)
    if names is not None and isinstance(classes, int) and len(names) != classes:
        raise ValueError(f"{len(names)} class names for a net of {classes} classes")
    _check_plain(inner.state_dict())
    metadata = {
        "format": FORMAT,
        "adn": __version__,
        "timm": timm.__version__,
        "origin": _verified_origin(inner),
        "plan": state.plan.to_dict(),
        "depth": str(get_depth(net)),
        "twins": state.twins,
        "class_names": names,
        "extra": dict(extra or {}),
    } | ({} if routing is None else {"routing": routing})
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_names and extra must be what JSON can hold: {error}") from error
    state.check_intact()
    # A block that torch.compile wraps in place has its names prefixed.
    tensors = _separate({name.replace("_orig_mod.", ""): tensor for name, tensor in inner.state_dict().items()}
                        | {_ROUTER + name: tensor for name, tensor in router.items()})
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            # safetensors reports a failed write as an error of its own that ends in the system's number.
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu"
         ) -> nn.Module:
    """Read a net that `save` wrote: same weights and dtypes, same depth, same class names.

    Args:
        path: the file.
        model: the source model, freshly built and not converted, for a file that does not say how to build it; it
            is converted by the stored plan, in place.
        device: where the net goes.

    Returns:
        The net, in the training mode of a model just built: call `.eval()` before using it. A routed one is in
        evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, of another kind or of a newer version of this library, or if the
            model that was built or passed does not have its names and shapes.
        ConversionError: if the stored plan does not fit the model passed.
    """
    metadata = read_metadata(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    router = {name.removeprefix(_ROUTER): tensors.pop(name) for name in list(tensors) if name.startswith(_ROUTER)}
    origin = metadata["origin"]
    if model is None:
        if origin is None:
            raise CheckpointError(
                f"{path} does not say how to build its model (it was not made by adn.create_model, or was altered "
                "since): build the source model as it was before adn.convert and pass it, adn.load(path, model=...)"
            )
        try:
            model = build_source(origin["name"], origin["kwargs"])
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} holds a {origin['name']}, which cannot be built here ({error}; it was written with timm "
                f"{metadata['timm']}, this is {timm.__version__}); pass the source model, adn.load(path, model=...)"
            ) from error
    net = convert(model, plan=Plan.from_dict(metadata["plan"]), twins=metadata["twins"])
    try:
        _check_fits(net, tensors, path)
    except CheckpointError:
        detach(net)
        raise
    _match_dtypes(net, tensors)
    load_tensors(net, tensors)
    state = state_of(net)
    state.origin, state.class_names = origin, metadata["class_names"]
    set_depth(net, metadata["depth"])
    net.to(device)
    if metadata["routing"] is None:
        return net
    # By name: it is built on top of all this, and brings the deploy form.
    routed = importlib.import_module(f"{__name__.partition('.')[0]}.routing.routed")
    return routed.RoutedNet.from_dict(net.eval(), metadata["routing"], router)


def load_tensors(net: nn.Module, tensors: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """`net.load_state_dict`, of tensors named as those of this version of its modules: some (MNASNet) ask for it."""
    state = OrderedDict(tensors)
    state._metadata = net.state_dict()._metadata
    net.load_state_dict(state, strict)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` wrote beside the weights, without reading these: `plan` (see `Plan.from_dict`), `depth`, `twins`,
    `origin`, `class_names`, `extra`, `routing` (None but of a routed net), and the versions `format`, `adn`, `timm`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, not a file of `save`, or of a newer version of this library.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; pass the file that adn.save wrote")
    beside = [name for name in ("best.safetensors", "model.safetensors") if path.with_name(name).exists()]
    if path.suffix == ".pt" and beside:
        raise CheckpointError(f"{path} is what adn train --resume needs, not a net; the net is in "
                              f"{' and '.join(beside)} beside it")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or cut short ({error}); adn.load reads what adn.save "
                              "wrote, adn.load_weights(net, path) reads other checkpoints") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path} holds weights but was not written by adn.save: build and convert the model, "
                              "then adn.load_weights(net, path)")
    try:
        found = json.loads(metadata[_KEY])
        if found["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by adn {found['adn']} in format {found['format']}; this version "
                                  f"reads formats up to {FORMAT}: upgrade adn")
        Plan.from_dict(found["plan"])
        return {field: found[field] for field in _FIELDS} | {"routing": found.get("routing")}
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its description cannot be read ({error!r})") from error


def _check_plain(state: Mapping[str, Any]) -> None:
    if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor) or value.is_quantized
               or type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided]:
        kind = type(state[odd[0]])
        raise ValueError(f"{odd[0]} is a {kind.__module__}.{kind.__name__}, which has no place in a file of tensors: "
                         "save the net before it is quantised, load it and quantise it again; or keep it with "
                         "torch.save")


def _separate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU that share no memory, as the format wants them; tied ones are written twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _verified_origin(net: nn.Module) -> dict[str, Any] | None:
    """How to build the source of this net, if building it now, without memory, gives the same names and shapes.

    For a model this library did not build, the name timm left on it does not tell its arguments: there the printed
    structure (activations, strides, epsilons, rates) must be the same as well.
    """
    state = state_of(net)
    architecture = (getattr(net, "pretrained_cfg", None) or {}).get("architecture")
    if state.origin is not None:
        origin = {"name": state.origin["name"], "kwargs": dict(state.origin["kwargs"])}
    elif architecture:
        origin = {"name": PREFIX + architecture, "kwargs": {}}
    else:
        return None
    if isinstance(getattr(net, "num_classes", None), int):
        origin["kwargs"]["num_classes"] = net.num_classes  # what reset_classifier changes
    try:
        json.dumps(origin)
    except (TypeError, ValueError):
        return None
    try:
        # Saving must not disturb a training run: whatever building draws, it draws elsewhere.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            again = convert(build_source(origin["name"], origin["kwargs"]), plan=state.plan, twins=state.twins)
    except (ConversionError, ValueError, TypeError, RuntimeError):
        return None
    if _shapes(again) != _shapes(net) or (state.origin is None and _structure(again) != _structure(net)):
        return None
    return origin


def _structure(net: nn.Module) -> tuple[str, str]:
    return str(net), str(getattr(net, "global_pool", None))


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def _check_fits(net: nn.Module, tensors: Mapping[str, torch.Tensor], path: object) -> None:
    own, stored = _shapes(net), {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [f"{name} is not in the file" for name in own.keys() - stored.keys()]
    wrong += [f"{name} is not in the net" for name in stored.keys() - own.keys()]
    wrong += [f"{name} is {tuple(stored[name])} in the file, {tuple(own[name])} in the net"
              for name in own.keys() & stored.keys() if own[name] != stored[name]]
    if wrong:
        raise CheckpointError(f"{path} does not fit this {type(net).__name__}: {'; '.join(sorted(wrong)[:4])}"
                              + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))


def _match_dtypes(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loading casts to the dtypes of the net; a net stored in half precision is to come back in half precision."""
    stored = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(stored) == 1:
        net.to(*stored)  # buffers that are not stored, too
    for name, tensor in net.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(tensors[name].dtype)
