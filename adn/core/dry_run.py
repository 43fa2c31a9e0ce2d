"""A model run on torch's meta device, where tensors have shapes and no values: what its modules are called with, and
which of them are residual. Takes about a second, no memory to speak of, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adn_kernels.private import pytree

from .behaviours import input_of, is_norm

_COMPUTING = (nn.Linear, nn.modules.conv._ConvNd)
# What may follow a residual sum, other than what is the identity above zero.
_ACTIVATIONS = (lambda x: x, F.silu, F.gelu, F.hardswish, F.mish, torch.tanh)


class CannotRun(ValueError):
    """A model does not run on any input that it was tried with; says why."""


@dataclasses.dataclass
class Call:
    """The call of a module, of which there was one.

    Attributes:
        module: as it is in the model that ran, on the meta device.
        args, kwargs, output: as given and returned.
        number: how many other modules returned before.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    number: int

    @property
    def input(self) -> Any:
        """Its first argument, however it was given."""
        return input_of(self.module, self.args, self.kwargs) if self.args or self.kwargs else None

    @property
    def result(self) -> Any:
        """What it made of its input: its output, or the first of several."""
        return self.output[0] if isinstance(self.output, tuple) and self.output else self.output

    @property
    def hands_on(self) -> bool:
        """Does it return a tuple of all it was given, by position, of which only the first is new?"""
        return (isinstance(self.output, tuple) and not self.kwargs and len(self.output) == len(self.args) > 1
                and all(map(_same, self.args[1:], self.output[1:])))

    @property
    def keeps_shape(self) -> bool:
        """Does it turn its first argument, a tensor, into one of the same shape, and hand on what else there is?"""
        x, y = self.input, self.result
        alone = self.output is y or self.hands_on
        return alone and isinstance(x, Tensor) and isinstance(y, Tensor) and y.shape == x.shape


def _same(given: Any, returned: Any) -> bool:
    if isinstance(given, list | tuple) and isinstance(returned, list | tuple):
        return list(given) == list(returned)
    return given is returned or (type(given) is type(returned) is int and given == returned)


def dry_run(model: nn.Module, samples: int = 1,
            way: Callable[[nn.Module], contextlib.AbstractContextManager] = contextlib.nullcontext) -> dict[str, Call]:
    """The calls of a model's modules, by name, in the order in which they return; of modules called more than once,
    none. In evaluation mode, on inputs of the size that the model was built for.

    Args:
        samples: how many inputs.
        way: a context that what runs, a copy of the model, is put in meanwhile.

    Raises:
        CannotRun: if the model runs on none of the inputs tried.
    """
    skeleton = _on_meta(model)
    names = {module: name for name, module in skeleton.named_modules() if name}
    dtype = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), None)
    reason = ""
    for shape in _inputs(model):
        calls: dict[str, Call] = {}
        twice: set[str] = set()

        def note(module: nn.Module, args: tuple, kwargs: dict, output: Any,
                 calls: dict[str, Call] = calls, twice: set[str] = twice) -> None:
            name = names[module]
            if name in calls:
                twice.add(name)
            calls[name] = Call(module, args, kwargs, output, len(calls))

        handles = [module.register_forward_hook(note, with_kwargs=True) for module in names]
        try:
            with torch.no_grad(), torch.device("meta"), way(skeleton):
                skeleton(torch.empty(samples, *shape, dtype=dtype))
        except Exception as error:  # of the model's own code
            reason = reason or f"{type(error).__name__} for an input {(samples, *shape)}: {error}".partition("\n")[0]
        else:
            return {name: call for name, call in calls.items() if name not in twice}
        finally:
            for handle in handles:
                handle.remove()
    raise CannotRun(reason)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the structure: no memory is taken for its tensors."""
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), types.FunctionType):
            # A copy would call the same function, and that may hold, and run, the model itself.
            raise CannotRun(f"the forward of {name or 'the model'} was replaced by a function")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, Tensor):
                meta = torch.empty_like(tensor, device="meta", requires_grad=False)
                memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    try:
        skeleton = copy.deepcopy(model, memo).eval()
    except Exception as error:  # of the model's own code
        raise CannotRun(f"it cannot be copied: {type(error).__name__}: {error}") from error
    for module in skeleton.modules():  # hooks of somebody's may look at values
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return skeleton


def _inputs(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of an input to try: of the size that the model says it is for, then of usual ones."""
    conv = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    first = 3 if conv is None else conv.in_channels
    if isinstance(conv, nn.Conv3d):
        yield from ((first, 16, side, side) for side in (112, 224))
        return
    said = [getattr(module, name, None) for name in ("img_size", "image_size") for module in model.modules()]
    config = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (first, 224, 224)
    sides = [side if isinstance(side, tuple) else (side, side) for side in said if side]
    shapes = [(channels, *side) for side in (*sides, config[1:], *((n, n) for n in (224, 256, 384, 64, 32)))
              for channels in (config[0], 3) if len(side) == 2 and all(isinstance(n, int) for n in side)]
    yield from dict.fromkeys(shapes)


def is_residual(call: Call) -> bool:
    """Is a block the identity, or an activation, where its convolutions and linear layers are zero, and its norms zero
    too or, should one stand on the shortcut, without effect?"""
    if not call.keeps_shape or not any(isinstance(module, _COMPUTING) for module in call.module.modules()):
        return False
    return any(_passes_on(call, norms) for norms in (0, 1))


def _passes_on(call: Call, norms: int) -> bool:
    """The same, with that scale of the norms."""
    block = copy.deepcopy(call.module).to_empty(device="cpu")
    with torch.no_grad():
        for module in block.modules():
            values = {"weight": norms, "running_var": norms} if is_norm(module) else {}
            other = 0 if values or isinstance(module, _COMPUTING) else 1
            for tensors, usual in ((module._parameters, other), (module._buffers, 0)):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensor.fill_(values.get(name, usual))

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        values = torch.linspace(0.5, 1.5, max(1, value.numel())) if value.is_floating_point() else torch.zeros(())
        return values.expand(value.numel()).reshape(value.shape).to(value.dtype)

    with torch.no_grad(), torch.device("cpu"):
        args, kwargs = pytree.tree_map(real, (call.args, call.kwargs))
        x = input_of(block, args, kwargs).clone()
        try:
            y = block(*args, **kwargs)
            y = y[0] if call.hands_on else y
        except Exception:  # it needs other values than these; nobody has seen that it is residual
            return False
    # To what the epsilon of a norm may take away.
    return any(torch.allclose(y, share * activation(x), rtol=1e-3, atol=1e-4)
               for activation in _ACTIVATIONS for share in (1, 0.5))
