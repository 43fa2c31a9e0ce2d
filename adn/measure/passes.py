"""One pass over the data at several depths, for whatever is measured; how a net is run for that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.depth import Depth
from ..core.progress import progress_bar
from ..core.state import at_depth, get_depth, is_any_depth, set_depth
from ..models.registry import source_of

Images = torch.Tensor | Sequence[torch.Tensor]
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_over(net: nn.Module, loader: Iterable[tuple[torch.Tensor, Any] | None], depths: Sequence[Depth | None],
             count: Callable[[int, Any, Any], None], device: torch.device, amp: torch.dtype | str | None,
             progress: bool) -> None:
    """Read every batch once and run it at all depths, as `adn.evaluate` says; a depth of None is that of a net which
    has but one. `count` gets, for each batch and depth, the index of the depth, 0 first, what the net gave, and what
    the loader has beside images."""
    run = net.module if isinstance(net, DistributedDataParallel) else net
    dtype = next(run.parameters()).dtype
    bar = progress_bar(loader, desc="evaluate", unit="batch", show=progress)
    with evaluating(net), torch.inference_mode(), autocast(device, amp):
        for batch in bar:
            if batch is None:
                continue
            images, targets = batch
            images = moved(images, device, dtype)
            for i, depth in enumerate(depths):
                if depth is not None:
                    set_depth(net, depth)
                count(i, try_forward(run, images), targets)


def moved(images: Images, device: torch.device, dtype: torch.dtype | None = None, **form: Any) -> Images:
    """Images, a batch (B, 3, H, W) or a list of (3, H, W), on a device; `form`: of a batch, arguments of `to`."""
    if isinstance(images, torch.Tensor):
        return images.to(device, dtype, non_blocking=True, **(form if images.ndim == 4 else {}))
    return [image.to(device, dtype, non_blocking=True) for image in images]


def device_of(net: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device asked for, else that of the net's parameters."""
    return next(net.parameters()).device if device is None else torch.device(device)


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module is in its own former mode and the net, if it has several
    depths, at the one it had."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        with at_depth(net, get_depth(net)) if is_any_depth(net) else contextlib.nullcontext():
            net.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(device: torch.device, amp: torch.dtype | str | None) -> contextlib.AbstractContextManager:
    """Autocast on `device` to "bf16", "fp16" or a dtype; None = none."""
    if amp is None:
        return contextlib.nullcontext()
    if isinstance(amp, str) and amp not in AMP_TYPES:
        raise ValueError(f"amp={amp!r}; pass one of {', '.join(map(repr, AMP_TYPES))}, a dtype, or None")
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, amp))


def try_forward(net: nn.Module, x: Images) -> Any:
    """`net(x)`; a net that cannot take it gets an error that says what was given and what it expects.

    Raises:
        ValueError: whatever the net raised, except for lack of memory.
    """
    try:
        return net(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        model = source_of(net)
        expected = _expected_size(model)
        hint = f"; it is made for images of {expected[0]} x {expected[1]}" if expected else ""
        given = f"a batch of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else (
            f"images of shapes {', '.join(str(tuple(image.shape)) for image in x[:3])}")
        raise ValueError(f"{type(model).__name__} cannot take {given}{hint} ({error})") from error


def processes() -> tuple[int, int]:
    """The number of this process in the process group, and how many there are; 0 and 1 without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_all_processes(value: Any) -> list[Any]:
    """What each process passes here, in their order."""
    every = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(every, value)
    return every


def no_image(what: str, loader: Any) -> str:
    """Why a loader gave nothing."""
    unreadable = getattr(getattr(loader, "dataset", None), "unreadable", ())
    if not unreadable:
        return f"no image to {what}: the loader is empty"
    return f"no image to {what}: none of {len(unreadable)} could be read, such as {unreadable[0]}"


def _expected_size(net: nn.Module) -> tuple[int, int] | None:
    """Image size a model was made for, where timm's or torchvision's attributes say so."""
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or getattr(net, "image_size", None)
    if size is None:
        size = (getattr(net, "pretrained_cfg", None) or {}).get("input_size")
        size = size and size[-2:]
    return (size, size) if isinstance(size, int) else size
