"""Two depths of one any-depth net, and a router that spends the deeper one where it pays."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import convert
from ..core.depth import Depth
from ..core.errors import CheckpointError
from ..core.state import DepthLike, set_depth, stages, state_of
from ..core.taps import listening
from ..measure.cost import count_macs, macs_of
from ..measure.passes import evaluating, moved
from ..measure.profile import clock_of
from ..models.registry import interface_of, source_of
from ..routers import AdvantageRouter, DifficultyRouter, Router
from ..runtime.fuse import FusedNet, fuse
from .controller import BudgetController
from .decisions import TIMES, Decision, Policy, cost_of, merge, select
from .policy import ThresholdPolicy


class ImageRouter(Router):
    """A tiny network on the reduced image: four convolutions, each with a norm, and a linear layer. It needs nothing of
    the net, so that it works for any, and decides before anything of it runs.

    Args:
        channels: of images.
        size: to which they are reduced, in pixels.
        width: of the first layer; each further one has twice as many, up to four times.

    Shape:
        features: one tensor, images (B, C, H, W) as the net takes them; returns (B,).
    """

    def __init__(self, channels: int = 3, size: int = 32, width: int = 16) -> None:
        super().__init__()
        self.settings = {"channels": channels, "size": size, "width": width}
        self.channels, self.size = channels, size
        widths = [channels, width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2 if i else 1, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for i, (a, b) in enumerate(itertools.pairwise(widths))))
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, features: Sequence[Tensor], path: Tensor | int | None = None) -> Tensor:
        x, = features
        return self.head(self.layers(self.reduced(x)).mean((2, 3))).flatten()

    def reduced(self, x: Tensor) -> Tensor:
        """Images as the first layer takes them, (B, C, size, size).

        Raises:
            ValueError: if they are none, or have other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images of shape {tuple(x.shape)}, the router is for (B, {self.channels}, H, W)")
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x.to(self.head.weight.dtype)


class RoutedNet(nn.Module):
    """An any-depth net, each of whose images runs at the one or the other of two depths.

        net = RoutedNet(adn.fuse(net), router, ThresholdPolicy.from_share(scores, 0.3))
        logits = net(images)                                # each image at the depth that its score says

        stream = RoutedNet(net, router, BudgetController(...), decide="next")
        for frame in video:
            outputs, decision = stream.step(frame[None], target=15)

    Images of a batch take routes of their own: each route runs once, on those that take it, and a route that none takes
    does not run. Outputs are in the order of the images, and equal to those of each image alone.

    Which features the router sees: with an `ImageRouter` the image; with `at`, the input of what depends on that flag
    (an early stage), in the deploy form alone, where all before it runs once and only what is after it parts; of a
    stream, with `taps`, the outputs of stages by the depth that ran. On a GPU the decisions over a batch of a deploy
    form stay on the device.

    Args:
        net: any-depth, in evaluation; a deploy form (`adn.fuse`) runs it in one go. Of a cascade of detectors
            (`dyyolov7`) both routes begin with the first backbone, which runs once and whose maps the router sees.
        router: see `adn.routers`; None = that of a cascade of detectors.
        policy: what decides; None = given with each call.
        decide: when the score is known: "within" the image, before the routes part; or after it, for the "next" one of
            a stream (`step`).
        shallow, deep: the two depths.
        at: index of a flag; the depths must agree on those before it.
        taps: names of stages (`adn.stages(net)`), for a router of a stream.

    Raises:
        ValueError: if a depth is not the net's, both are one, or the router could not see what it is to.
    """

    def __init__(self, net: nn.Module, router: Router | None = None, policy: Policy | None = None, *,
                 shallow: DepthLike = "base", deep: DepthLike = "super", decide: str = "within", at: int | None = None,
                 taps: Sequence[str] = ()) -> None:
        super().__init__()
        if decide not in TIMES:
            raise ValueError(f"decide={decide!r}; pass one of {', '.join(map(repr, TIMES))}")
        self.router, self.policy, self.decide = router, policy, decide
        self._ahead: bool | _Awaited = False  # of a stream: does the next image take the deep route?
        state = state_of(net)
        pair = state.full, state.base
        self.net = net
        if (model := self._cascade) is not None:
            self.router = model.router if router is None else router
            if isinstance(net, FusedNet):
                at = 0
        self.depths = Depth.parse(shallow, pair), Depth.parse(deep, pair)
        if self.depths[0] == self.depths[1]:
            raise ValueError(f"both depths are {self.depths[0]}; pass two")
        self.at, self.taps = at, tuple(taps)
        if at is not None:
            self._check_place(at)
        if self.taps:
            if isinstance(net, FusedNet) or decide != "next":
                raise ValueError("taps are for streams (decide='next') of a net that is no deploy form, which has no "
                                 "stages to listen to: use an ImageRouter, or at=")
            known = [stage.name for stage in stages(net)]
            if unknown := [name for name in self.taps if name not in known]:
                raise ValueError(f"no stage {unknown[0]!r}; this net has {', '.join(known)}")

    @classmethod
    def from_anydepth(cls, net: nn.Module, base: DepthLike = "base", super: DepthLike = "super", **settings: Any
                      ) -> RoutedNet:
        """Two depths of an any-depth net."""
        return cls(net, shallow=base, deep=super, **settings)

    @classmethod
    def from_detectors(cls, first: nn.Module, second: nn.Module, links: nn.Module | None = None, **settings: Any
                       ) -> RoutedNet:
        """Two detectors, of which the second goes on with the first one's maps.

        Args:
            first: one that can stand before another (it has `before`): a YOLOv7.
            links: from the one to the other; None = fresh ones.

        Raises:
            ValueError: if it cannot, or the two do not fit.
        """
        if not hasattr(first, "before"):
            raise ValueError(f"a {type(first).__name__} does not give its maps to another detector; pass two YOLOv7")
        return cls(convert(first.before(second, links)), **settings)

    def extra_repr(self) -> str:
        place = f", at={self.at}" if self.at is not None else f", taps={list(self.taps)}" if self.taps else ""
        return f"shallow={self.depths[0]}, deep={self.depths[1]}, decide={self.decide!r}{place}"

    @property
    def _cascade(self) -> nn.Module | None:
        """The model, if it is one of detectors, whose routes begin with the same maps, and which has a router."""
        model = source_of(self.net)
        return model if hasattr(model, "answer") else None

    def __getattr__(self, name: str) -> Any:
        if name in _OF_DETECTORS:  # for those who ask a detector
            return getattr(interface_of(self.net), name)
        return super().__getattr__(name)

    def begin(self, x: Any) -> tuple[Sequence[Tensor], Any]:
        """What both routes share of a batch: features for the router, and whatever they go on with."""
        if (model := self._cascade) is not None:
            taps = model.features(x)
            return taps, taps
        return [x if torch.is_tensor(x) else torch.stack([_square(image, self.router.size) for image in x])], None

    def shallow(self, x: Any, shared: Sequence[Tensor] | None = None) -> Any:
        """What the shallow route makes of a batch."""
        return self._at(self.depths[0], x, shared)

    def deep(self, x: Any, shared: Sequence[Tensor] | None = None) -> Any:
        """What the deep route makes of a batch."""
        return self._at(self.depths[1], x, shared)

    def _at(self, depth: Depth, x: Any, shared: Sequence[Tensor] | None) -> Any:
        set_depth(self.net, depth)
        if shared is None:
            return self.net(x)
        model = self._cascade
        return model.outputs(model.answer(x, *shared))

    def forward(self, x: Any) -> Any:
        """Of each image what its route makes of it."""
        return self.route(x)[0]

    def route(self, x: Any, policy: Policy | None = None) -> tuple[Any, Decision]:
        """The outputs of a batch, and the decisions.

        Args:
            x: (B, ...), or a list of images where the net takes such.
            policy: in place of its own.

        Raises:
            ValueError: without a policy or a router, or where the router was made for other features.
        """
        policy = self._policy(policy)
        if self.at is not None:
            return self._route_inside(x, policy)
        features, shared = self.begin(x)
        score = self._score(features)
        deep = score > policy.tau
        if isinstance(self.net, FusedNet) and torch.is_tensor(x) and x.is_cuda:
            # Nobody waits for the decisions, so that what they cost is not known.
            return self.net.per_image(x, self._rows(deep)), Decision(score, deep, None)
        return self._both(x, shared, deep), Decision(score, deep, cost_of(policy, deep))

    def features(self, x: Any, deep: bool = False) -> Sequence[Tensor]:
        """What the router sees of a batch, and scores; of a stream that of the one or the other route."""
        if self.at is not None:
            return self._inside(x, None)[1].features
        return self.run(x, deep)[1] if self.taps else self.begin(x)[0]

    def score(self, x: Any) -> Tensor:
        """(B,): what the router says of a batch, whose routes do not run."""
        return self._score(self.features(x), 0)

    def scores(self, loader: Iterable[Any]) -> list[float]:
        """Of all images of a loader, in its order; for `ThresholdPolicy.from_share`."""
        device = next(self.parameters()).device
        found: list[float] = []
        with evaluating(self), torch.no_grad():
            for batch in loader:
                if batch is None:
                    continue
                x = batch[0] if isinstance(batch, tuple | list) else batch
                found += self.score(moved(x, device)).tolist()
        return found

    def macs(self, x: Any) -> tuple[int, int]:
        """Multiply-adds of an image by the whole shallow and the whole deep route, router included; see
        `adn.measure.cost.count_macs`.

        Args:
            x: a batch of at least one image.
        """
        with evaluating(self), torch.no_grad():
            features = self.features(x[:1])
            router = macs_of(lambda: self._score(features))
        shallow, deep = count_macs(self.net, x[:1], self.depths)
        return shallow + router, deep + router

    def measure(self, x: Any, rounds: int = 20, warmup: int = 3) -> tuple[float, float]:
        """What the whole shallow and the whole deep route cost, router included: medians in milliseconds, measured in
        turn.

        Args:
            x: a batch as will come; of several images the time is of all of them.
        """
        clock = clock_of(x[0].device)
        routes = [ThresholdPolicy(float("inf")), ThresholdPolicy(float("-inf"))]
        times: list[list[float]] = [[], []]
        with evaluating(self), torch.no_grad():
            for step in range(-warmup, rounds):
                for each, policy in zip(times, routes, strict=True):
                    ms = clock(lambda images, policy=policy: self.route(images, policy), x)
                    if step >= 0:
                        each.append(ms)
        shallow, deep = (sorted(each)[len(each) // 2] for each in times)
        return shallow, deep

    def reset(self) -> None:
        """A stream begins: its first image takes the shallow route."""
        self._ahead = False

    def step(self, x: Any, *, target: float | None = None, cost: Callable[[], float] | None = None,
             policy: Policy | None = None) -> tuple[Any, Decision]:
        """The next image of a stream; the score that is made of it decides over the one after it.

        Args:
            x: a batch of one image. On a GPU nothing waits for it, but with a policy that follows a target: its score
                is on its way to the host until the next image comes.
            target: what it should cost on average, for a policy that follows one (`BudgetController`).
            cost: called once the image is done, gives what it cost, in the unit of the controller's costs (millijoules,
                say); None = milliseconds, measured here, which waits for the device.
            policy: in place of its own.

        Returns:
            What the route made of it, and the decision over this image (its score is that for the next).

        Raises:
            ValueError: as `route`; with more images than one, or a controller without a target.
        """
        policy = self._policy(policy)
        if self.decide != "next":
            raise ValueError("this decides within the image; for a stream: RoutedNet(net, ..., decide='next')")
        if len(x) != 1:
            raise ValueError(f"{len(x)} images; a stream comes one by one: routed.step(x[i : i + 1])")
        follows = hasattr(policy, "update")
        if follows and target is None:
            raise ValueError(f"a {type(policy).__name__} follows a target: routed.step(x, target=...)")
        deep, start = bool(self._ahead), time.perf_counter()
        outputs, features = self.run(x, deep)
        score = self._score(features, int(deep))
        if follows:
            value = score.item()  # waits for all that was launched
            spent = (time.perf_counter() - start) * 1e3 if cost is None else cost()
            policy.update(target, spent, value)
            self._ahead = policy.deep(value)
        else:
            self._ahead = _Awaited(score, policy)
        return outputs, Decision(score, torch.tensor([deep], device=score.device), spent if follows else None)

    def run(self, x: Any, deep: bool) -> tuple[Any, Sequence[Tensor]]:
        """A batch by one route, and what the router sees of it."""
        if self.at is not None:
            outputs, inside = self._inside(x, deep)
            return outputs, inside.features
        if not self.taps:
            features, shared = self.begin(x)
            return (self.deep if deep else self.shallow)(x, shared), features
        found: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for stage in stages(self.net):
                if stage.name in self.taps:
                    stack.enter_context(listening(stage.end, functools.partial(found.__setitem__, stage.name)))
            outputs = (self.deep if deep else self.shallow)(x)
        return outputs, [found[name] for name in self.taps]

    def routing_to_dict(self) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
        """What a file of this is made of: the any-depth net; all else but tensors; the router's tensors.

        Raises:
            ValueError: if the policy is of a kind that no file can hold.
        """
        policy = self.policy
        if policy is not None and type(policy).__name__ not in POLICIES:
            raise ValueError(f"a policy that is a {type(policy).__name__} has no place in a file: save with "
                             "routed.policy = None, and set it after loading")
        own = self.router is None or self.router is getattr(self._cascade, "router", None)  # in the net's own file
        router = None if own else {"kind": type(self.router).__name__, "settings": self.router.settings}
        shallow, deep = map(str, self.depths)
        values = {"shallow": shallow, "deep": deep, "decide": self.decide, "at": self.at, "taps": list(self.taps),
                  "router": router,
                  "policy": policy and {"kind": type(policy).__name__, **policy.to_dict()}}
        return source_of(self.net), values, {} if own else self.router.state_dict()

    @classmethod
    def from_dict(cls, net: nn.Module, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RoutedNet:
        """Of what `routing_to_dict` gave, around the net in evaluation mode; where a decision is made inside a forward,
        around its deploy form.

        Raises:
            CheckpointError: if it is not that.
        """
        try:
            router = values["router"] and ROUTERS[values["router"]["kind"]](**values["router"]["settings"])
            if router is not None:
                router.load_state_dict(tensors)
            policy = dict(values["policy"]) if values["policy"] else None
            if policy is not None:
                policy = POLICIES[policy.pop("kind")].from_dict(policy)
            routed = cls(fuse(net) if values["at"] is not None else net, router, policy, **{
                name: values[name] for name in ("shallow", "deep", "decide", "at", "taps")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the description of a router cannot be read ({error!r})") from error
        if router is not None:
            router.to(next(net.parameters()).device)
        return routed.eval()

    def _both(self, x: Any, shared: Any, deep: Tensor) -> Any:
        """Each image by its route. One read of the decisions: the host has to know what to launch."""
        chosen = deep.tolist()
        if not any(chosen):
            return self.shallow(x, shared)
        if all(chosen):
            return self.deep(x, shared)
        parts = []
        for route, value in ((self.shallow, False), (self.deep, True)):
            places = [i for i, taken in enumerate(chosen) if taken is value]
            parts.append((places, route(select(x, places, len(chosen)), select(shared, places, len(chosen)))))
        return merge(parts)

    def _policy(self, policy: Policy | None) -> Policy:
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ValueError("no policy to decide by: routed.policy = ThresholdPolicy.from_share("
                             "routed.scores(loader), share), or pass one with the call")
        return policy

    def _score(self, features: Sequence[Tensor], path: int | None = None) -> Tensor:
        if self.router is None:
            raise ValueError("there is no router: train one (adn route fit), or load weights that have one")
        return self.router(features, path)

    def _route_inside(self, x: Any, policy: Policy) -> tuple[Any, Decision]:
        outputs, inside = self._inside(x, lambda score: score > policy.tau)
        cost = None if inside.deep.is_cuda else cost_of(policy, inside.deep)
        return outputs, Decision(inside.score, inside.deep, cost)

    def _inside(self, x: Any, decide: Callable[[Tensor], Tensor] | bool | None) -> tuple[Any, _Inside]:
        """A batch by the deploy form, which stops where the routes part if nothing is decided."""
        inside = _Inside(self, decide)
        with contextlib.suppress(_Done):
            return self.net.per_image(x, inside), inside
        return None, inside

    def _rows(self, deep: Tensor) -> Tensor:
        """int32 (flags, B): of each image the entries of its depth."""
        columns = torch.tensor([[int(entry) for entry in depth] for depth in self.depths], dtype=torch.int32)
        return columns.to(deep.device)[deep.long()].T.contiguous()

    def _check_place(self, at: int) -> None:
        if not isinstance(self.net, FusedNet):
            raise ValueError("a decision inside a forward (at=) takes a deploy form: RoutedNet(adn.fuse(net), ...)")
        if not 0 <= at < len(self.depths[0]):
            raise ValueError(f"at={at}; pass the index of a flag, 0 to {len(self.depths[0]) - 1}")
        shallow, deep = self.depths
        if different := [k for k in range(at) if shallow[k] != deep[k]]:
            raise ValueError(f"at={at}, but the depths {shallow} and {deep} part at flag {different[0]} already: pass "
                             "depths that agree before it, or an earlier flag")


Cascade = RoutedNet  # as the literature calls it

_OF_DETECTORS = ("num_classes", "postprocess", "letterbox", "stride", "adn_task")

# Of files.
ROUTERS = {kind.__name__: kind for kind in (AdvantageRouter, DifficultyRouter, ImageRouter)}
POLICIES = {kind.__name__: kind for kind in (BudgetController, ThresholdPolicy)}


class _Awaited:
    """Whether a policy is for the deep route, by a score that may not be on the host yet: whoever asks waits for it."""

    def __init__(self, score: Tensor, policy: Policy) -> None:
        self.policy, self.event = policy, None
        self.score = score.detach()
        if score.is_cuda:
            self.score = torch.empty(score.shape, dtype=score.dtype, pin_memory=True)
            self.score.copy_(score.detach(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return self.policy.deep(self.score.item())


class _Done(Exception):
    """The features are known, and nothing else was asked for."""


class _Inside:
    """What a deploy form asks for the entries of each image: of flag `at` it makes the decision.

    Attributes:
        features: what the router sees: the input of what depends on that flag; of a cascade of detectors, all maps of
            the first backbone.
        score, deep: (B,), once they are known.
    """

    def __init__(self, routed: RoutedNet, decide: Callable[[Tensor], Tensor] | bool | None) -> None:
        self.routed, self.decide = routed, decide
        self.features: Sequence[Tensor] = ()
        self.score: Tensor | None = None
        self.deep: Tensor | None = None

    def __call__(self, k: int, *inputs: Tensor) -> Tensor | list[bool | int]:
        shallow, deep = (depth[k] for depth in self.routed.depths)
        cascade = self.routed._cascade is not None
        if k == self.routed.at:
            self.features = inputs[1:] if cascade else inputs[:1]
            if self.decide is None:
                raise _Done
            if callable(self.decide):
                self.score = self.routed._score(self.features)
                self.deep = self.decide(self.score)
        if shallow == deep or not callable(self.decide):
            return [deep if self.decide else shallow] * len(inputs[0])
        # On a GPU the decisions stay there, but over detectors: the host has to know which of them to launch.
        if self.deep.is_cuda and not cascade:
            return torch.where(self.deep, int(deep), int(shallow)).to(torch.int32)
        return [deep if taken else shallow for taken in self.deep.tolist()]


def _square(image: Tensor, size: int) -> Tensor:
    """One of a list of images, as an `ImageRouter` sees it."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
