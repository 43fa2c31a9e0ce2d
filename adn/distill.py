"""Self-distillation between a net's deepest and shallowest self.

Adaptive Depth Networks (NeurIPS 2024), Algorithm 1: per batch the super-net learns from the labels, the base-net from
the super-net, and all other depths come for free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adn_kernels.private import pytree

from .core.behaviours import TWO_PASSES, halves, original_class
from .core.dry_run import Call, CannotRun, dry_run
from .core.outputs import logits_of
from .core.state import Stage, at_depth, stages, super_and_base, unwrap
from .core.taps import listening

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

VARIANTS = ("neurips", "eq8", "labels")


def distillation_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0,
                    top_classes: int | None = None) -> torch.Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, summed over classes, mean over rows; teacher detached.

    Args:
        teacher, student: (B, C), any floating type; half precision is computed in float32.
        top_classes: only the teacher's largest this many classes per row, both sides renormalised; None = all.

    Returns:
        A scalar.
    """
    teacher, student = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (teacher.detach(), student))
    if top_classes is not None and top_classes < teacher.shape[1]:
        top = teacher.topk(top_classes, dim=1, sorted=False).indices
        teacher, student = teacher.gather(1, top), student.gather(1, top)
    kl = F.kl_div(
        F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1), log_target=True,
        reduction="batchmean",
    )
    return temperature**2 * kl


def pool_features(feature: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """Global average over everything but batch and channels: (B, C, H, W) with channel_dim 1, or (B, ..., C) with -1,
    to (B, C)."""
    return feature.flatten(2).mean(2) if channel_dim == 1 else feature.flatten(1, -2).mean(1)


class TwoPass(nn.Module):
    """A step of training that runs a net, `self.net`, twice: the super-net, then the base-net, which learns from it.

    A subclass has `net`, and says what a pass at the depth that is set gives, `_run(x, y)`; the terms of each net by
    name, `_super_terms(of_super, y)`, with `super` among them, and `_base_terms(of_base, y, of_super)`, with `base`,
    whose sum is the loss; and, without its graph, the part of the super-net's outputs that the base-net learns from,
    `_teaching(of_super)`.
    """

    def forward(self, x: torch.Tensor, y: Any) -> dict[str, torch.Tensor]:
        """Both passes: x (B, ...), y as the criterion takes it. The depth is what it was, afterwards.

        Returns:
            Every term by name, `super`, `base` and their sum, `loss`, from which to go back.
        """
        of_super = self._run_at(x, y, "super")
        terms = self._super_terms(of_super, y)
        terms |= self._base_terms(self._run_at(x, y, "base"), y, of_super)
        return {**terms, "loss": self._reaching_all(terms["super"] + terms["base"], of_super)}

    def backward(self, x: torch.Tensor, y: Any, scaler: Any = None) -> dict[str, torch.Tensor]:
        """Both passes, each with its backward at once: the same gradients, the memory of one pass.

        Adds to `.grad`; the caller zeroes and steps. Autocast, if any, is the caller's context.

        Args:
            scaler: a `torch.amp.GradScaler`; each loss is scaled before its backward.

        Returns:
            What a call returns, detached.

        Raises:
            As a call; and ValueError if the net is in DistributedDataParallel without `find_unused_parameters` (each
            pass leaves some parameters out).
        """
        scale = _scale(scaler)
        with self._not_averaged():
            of_super = self._run_at(x, y, "super")
            terms = self._super_terms(of_super, y)
            scale(terms["super"]).backward()
        of_super = self._teaching(of_super)
        terms |= self._base_terms(self._run_at(x, y, "base"), y, of_super)
        scale(terms["base"]).backward()
        terms["loss"] = terms["super"] + terms["base"]
        return {name: value.detach() for name, value in terms.items()}

    def _run_at(self, x: torch.Tensor, y: Any, depth: str) -> Any:
        with at_depth(self.net, depth):
            return self._run(x, y)

    def _reaching_all(self, loss: torch.Tensor, _of_super: Any) -> torch.Tensor:
        """The loss, so that every parameter gets a gradient from it where processes average them."""
        return loss

    def _not_averaged(self) -> contextlib.AbstractContextManager:
        """For the first of two backwards through the net: processes do not average gradients yet."""
        if not isinstance(self.net, DistributedDataParallel):
            return contextlib.nullcontext()
        if not self.net.find_unused_parameters:
            raise ValueError(
                "each of the two passes leaves some parameters out: wrap the net with find_unused_parameters=True, "
                f"or wrap {type(self).__name__} itself in DistributedDataParallel and call it instead"
            )
        return self.net.no_sync()


def _scale(scaler: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return scaler.scale if scaler is not None else lambda loss: loss


class Supervised(nn.Module):
    """The loss of a plain network: `criterion(net(x), y)`; counterpart of `SelfDistillation` for comparisons."""

    def __init__(self, net: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.net = net
        self.criterion = criterion

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.criterion(self.net(x), y)}


class SelfDistillation(TwoPass):
    """The training loss of an any-depth net, both passes inside one forward.

    `loss = alpha * criterion(super(x), y) + (1 - alpha) * (KL over logits + sum of KL over stage features)`, where
    every KL is `distillation_kl(super, base)`; only the super-net sees labels.

        kd = adn.SelfDistillation(net, nn.CrossEntropyLoss())
        losses = kd(x, y)            # runs the super-net, then the base-net
        losses["loss"].backward()

    For many GPUs wrap this module, not the net, in DistributedDataParallel: its forward uses every parameter, so no
    search for unused ones is needed. `backward` is the way with a lower peak of memory. In a module of one's own, as
    trainers want it, hold this alone and not the net beside it, which is `kd.net`: safetensors writes no tensor under
    two names.

    `single_pass=True` runs both nets in one forward of the net, with a doubled batch from where they part: what comes
    before runs once, every shared layer is launched once, gradients come from one backward. Losses, gradients and
    running statistics are those of two passes, to rounding. Two things differ: activations of both nets are held at
    once, and where the net draws random numbers (dropout), both nets' are drawn together, and before they part drawn
    once for both. Stochastic depth of essential blocks acts on the super-net alone, as ever. A module of one's own that
    mixes the samples of a batch, and is no norm of torch or timm, needs two passes.

    Args:
        net: a converted net whose output is logits (B, classes).
        criterion: loss of (logits, targets); targets are whatever it takes, indices (B,) or mixed rows (B, classes).
            None = cross-entropy.
        alpha: weight of the super-net's loss, in [0, 1].
        temperature: T of every KL.
        top_classes: how many of the super-net's largest classes the logit KL compares; None = all.
        features: stages (names, or indices into `adn.stages(net)`) whose pooled outputs are compared too, or "all".
        variant: "neurips" (the above); "eq8", the earlier paper's Eq. 8: all stages and all classes; "labels", its
            ablation without distillation: both nets learn from the labels.
        single_pass: run super-net and base-net in one forward; see above.

    Returns (of a call):
        A dict of scalars: `loss`; its summands `super` and `base`, weighted; every term by name, unweighted: `task`,
        `kl_logits`, `kl_<stage>` (or `task_base`). And, detached, the logits `super_logits`, `base_logits`.

    Raises:
        ValueError: if the net is not any-depth, a setting is out of range, or the net cannot run both in one forward.
    """

    def __init__(
        self,
        net: nn.Module,
        criterion: Criterion | None = None,
        alpha: float = 0.5,
        temperature: float = 1.0,
        top_classes: int | None = 500,
        features: Sequence[str | int] | str = (),
        variant: str = "neurips",
        single_pass: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}; pass one of {', '.join(map(repr, VARIANTS))}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}; pass a weight between 0 and 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}; pass a number above 0")
        if top_classes is not None and top_classes < 1:
            raise ValueError(f"top_classes={top_classes}; pass a number of classes, or None for all")
        if variant == "eq8":
            features, top_classes = "all", None
        elif variant == "labels" and features:
            raise ValueError('variant="labels" distils nothing; leave `features` empty')
        if single_pass:
            _check_runs_both(net)
        self.net = net
        self.criterion = F.cross_entropy if criterion is None else criterion
        self.alpha = alpha
        self.temperature = temperature
        self.top_classes = top_classes
        self.variant = variant
        self.single_pass = single_pass
        self.features = _chosen(stages(net), features)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both passes: x (B, ...), y as the criterion takes it. The depth is what it was, afterwards.

        Raises:
            RuntimeError: with `single_pass`, if tensors in the net do not have the samples in their first dimension, or
                a batch norm was added after conversion.
        """
        if not self.single_pass:
            return super().forward(x, y)
        of_super, of_base = self._run_both(x)
        terms = self._super_terms(of_super, y) | self._base_terms(of_base, y, of_super)
        return {**terms, "loss": terms["super"] + terms["base"]}

    def backward(self, x: torch.Tensor, y: torch.Tensor, scaler: Any = None) -> dict[str, torch.Tensor]:
        """As `TwoPass.backward`: each pass with its backward at once, for the memory of one pass. With `single_pass`
        there is one backward, that of the sum."""
        if not self.single_pass:
            return super().backward(x, y, scaler)
        terms = self(x, y)
        _scale(scaler)(terms["loss"]).backward()
        return {name: value.detach() for name, value in terms.items()}

    def extra_repr(self) -> str:
        names = [stage.name for stage in self.features]
        return (f"variant={self.variant!r}, alpha={self.alpha}, temperature={self.temperature}, "
                f"top_classes={self.top_classes}, features={names}, single_pass={self.single_pass}")

    def _run(self, x: torch.Tensor, _y: torch.Tensor) -> _Output:
        with _tap(self.features) as features:
            return _Output(_as_logits(self.net(x)), features)

    def _run_both(self, x: torch.Tensor) -> tuple[_Output, _Output]:
        """Of the super-net and of the base-net, from one forward."""
        samples = x.shape[0]
        with super_and_base(self.net, samples), _tap(self.features) as features:
            logits = _as_logits(self.net(x))
        if logits.shape[0] != 2 * samples:
            raise RuntimeError(f"super-net and base-net of {samples} samples ran at once, but there are logits of "
                               f"{logits.shape[0]}: their samples got mixed; {TWO_PASSES}")
        both = [halves(output, samples) for output in (logits, *features)]
        (logits, *features), (base_logits, *base_features) = zip(*both, strict=True)
        return _Output(logits, features), _Output(base_logits, base_features)

    def _super_terms(self, of_super: _Output, y: torch.Tensor) -> dict[str, torch.Tensor]:
        task = self.criterion(of_super.logits, y)
        return {"task": task, "super": self.alpha * task, "super_logits": of_super.logits.detach()}

    def _base_terms(self, of_base: _Output, y: torch.Tensor, of_super: _Output) -> dict[str, torch.Tensor]:
        logits = of_base.logits
        if self.variant == "labels":
            terms = {"task_base": self.criterion(logits, y)}
        else:
            terms = {"kl_logits": distillation_kl(of_super.logits, logits, self.temperature, self.top_classes)}
            for stage, a, b in zip(self.features, of_super.features, of_base.features, strict=True):
                terms[f"kl_{stage.name}"] = distillation_kl(a, b, self.temperature)
        return {**terms, "base": (1 - self.alpha) * sum(terms.values()), "base_logits": logits.detach()}

    def _teaching(self, of_super: _Output) -> _Output:
        return _Output(of_super.logits.detach(), [feature.detach() for feature in of_super.features])


_TRIED = 5  # samples: a number that few other sizes of tensors are


def _check_runs_both(net: nn.Module) -> None:
    """Raise ValueError if running super-net and base-net in one forward changes more than the size of the batch.

    A model may compute with a size that it read before the two part (`x.reshape(B, h, w, -1)`), and then mixes them.
    What cannot be run without values is not looked at.
    """
    inner = unwrap(net)
    try:
        alone = dry_run(inner, _TRIED)
    except CannotRun:
        return
    try:
        both = dry_run(inner, _TRIED, lambda skeleton: super_and_base(skeleton, _TRIED))
    except CannotRun as error:
        raise ValueError(f"this {original_class(inner).__name__} cannot run super-net and base-net in one forward "
                         f"({str(error).removesuffix(f'; {TWO_PASSES}')}): {TWO_PASSES}") from error
    for name in filter(alone.__contains__, both):
        for one, two in zip(_tensors(alone[name]), _tensors(both[name]), strict=False):
            doubled = [tuple(2 * n if i == dim else n for i, n in enumerate(one.shape)) for dim in range(one.ndim)
                       if dim == 0 or one.shape[dim] == _TRIED]  # the dimension of the samples, wherever it stands
            if two.shape not in (one.shape, *doubled):
                raise ValueError(
                    f"this {original_class(inner).__name__} cannot run super-net and base-net in one forward: {name!r} "
                    f"computes {tuple(two.shape)} for both and {tuple(one.shape)} for one, so the samples of the two "
                    f"get mixed (a size of the batch that was read before they part?); {TWO_PASSES}")


def _tensors(call: Call) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs, call.output)) if torch.is_tensor(leaf)
            and leaf.ndim]


class _Output(NamedTuple):
    """Of one net: logits (B, classes), and pooled features of the chosen stages."""

    logits: torch.Tensor
    features: list[torch.Tensor]


def _as_logits(output: Any) -> torch.Tensor:
    output = logits_of(output)
    if not torch.is_tensor(output) or output.ndim != 2:
        what = f"a tensor of shape {tuple(output.shape)}" if torch.is_tensor(output) else type(output).__name__
        raise ValueError(f"self-distillation compares logits (B, classes); this net returns {what}")
    return output


def _chosen(known: list[Stage], wanted: Sequence[str | int] | str) -> list[Stage]:
    if wanted == "all":
        return known
    if isinstance(wanted, str):
        wanted = [wanted]
    places = {stage.name: stage for stage in known} | {i: known[i] for i in range(-len(known), len(known))}
    if unknown := [entry for entry in wanted if entry not in places]:
        raise ValueError(f"no stage {unknown[0]!r} to take features from; pass some of "
                         f"{[stage.name for stage in known]}, indices below {len(known)}, or \"all\"")
    return [places[entry] for entry in wanted]


@contextlib.contextmanager
def _tap(chosen: Sequence[Stage]) -> Iterator[list[Any]]:
    """Collect the pooled outputs of these stages, from the forward inside the block."""
    taps: list[Any] = [None] * len(chosen)
    with_grad = torch.is_grad_enabled()

    def tap(i: int, output: torch.Tensor) -> None:
        if with_grad and not torch.is_grad_enabled():
            raise RuntimeError("the stage's features have no gradient inside a reentrant checkpoint: checkpoint with "
                               "use_reentrant=False, or leave `features` empty")
        taps[i] = pool_features(output, chosen[i].plan.channel_dim)

    with contextlib.ExitStack() as stack:
        for i, stage in enumerate(chosen):
            stack.enter_context(listening(stage.end, functools.partial(tap, i)))
        yield taps
    for stage, features in zip(chosen, taps, strict=True):
        if features is None:
            raise RuntimeError(f"no output of stage {stage.name!r} was seen: torch.compile compiled a forward that "
                               "calls its blocks one by one (gradient checkpointing?); compile without, or leave "
                               "`features` empty")
