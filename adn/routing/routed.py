"""Two depths of one any-depth net, and a router that spends the deeper one where it pays."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import convert
from ..core.depth import Depth
from ..core.errors import CheckpointError
from ..core.state import DepthLike, set_depth, stages, state_of
from ..core.taps import listening
from ..models.registry import interface_of, source_of
from ..routers import AdvantageRouter, DifficultyRouter, Router
from ..runtime.fuse import FusedNet, fuse
from .controller import BudgetController
from .policy import ThresholdPolicy
from .two_routes import Decision, Policy, TwoRoutes, cost_of


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


class RoutedNet(TwoRoutes):
    """An any-depth net, each of whose images runs at the one or the other of two depths.

        net = RoutedNet(adn.fuse(net), router, ThresholdPolicy.from_share(scores, 0.3))
        logits = net(images)                                # each image at the depth that its score says

        stream = RoutedNet(net, router, BudgetController(...), decide="next")
        for frame in video:
            outputs, decision = stream.step(frame[None], target=15)

    Which features the router sees: with an `ImageRouter` the image; with `at`, the input of what depends on that flag
    (an early stage), in the deploy form alone, where all before it runs once and only what is after it parts; of a
    stream, with `taps`, the outputs of stages by the depth that ran. On a GPU the decisions over a batch of a deploy
    form stay on the device.

    Args:
        net: any-depth, in evaluation; a deploy form (`adn.fuse`) runs it in one go. Of a cascade of detectors
            (`dyyolov7`) both routes begin with the first backbone, which runs once and whose maps the router sees.
        router: see `adn.routers`; None = that of a cascade of detectors.
        policy, decide: as of `TwoRoutes`.
        shallow, deep: the two depths.
        at: index of a flag; the depths must agree on those before it.
        taps: names of stages (`adn.stages(net)`), for a router of a stream.

    Raises:
        ValueError: if a depth is not the net's, both are one, or the router could not see what it is to.
    """

    def __init__(self, net: nn.Module, router: Router | None = None, policy: Policy | None = None, *,
                 shallow: DepthLike = "base", deep: DepthLike = "super", decide: str = "within", at: int | None = None,
                 taps: Sequence[str] = ()) -> None:
        super().__init__(router, policy, decide=decide)
        state = state_of(net)
        pair = state.full, state.base
        self.net = net
        if (model := self._cascade) is not None:
            if isinstance(net, FusedNet):
                raise ValueError(f"the routes of a {type(model).__name__} part where a deploy form does not stop: pass "
                                 "the net itself (adn.fuse runs the one or the other)")
            self.router = model.router if router is None else router
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
        if (model := self._cascade) is not None:
            taps = model.features(x)
            return taps, taps
        return [x if torch.is_tensor(x) else torch.stack([_square(image, self.router.size) for image in x])], None

    def shallow(self, x: Any, shared: Sequence[Tensor] | None = None) -> Any:
        return self._at(self.depths[0], x, shared)

    def deep(self, x: Any, shared: Sequence[Tensor] | None = None) -> Any:
        return self._at(self.depths[1], x, shared)

    def _at(self, depth: Depth, x: Any, shared: Sequence[Tensor] | None) -> Any:
        set_depth(self.net, depth)
        if shared is None:
            return self.net(x)
        model = self._cascade
        return model.outputs(model.answer(x, *shared))

    def route(self, x: Any, policy: Policy | None = None) -> tuple[Any, Decision]:
        if self.at is not None:
            return self._route_inside(x, self._policy(policy))
        if not (isinstance(self.net, FusedNet) and torch.is_tensor(x) and x.is_cuda):
            return super().route(x, policy)
        policy = self._policy(policy)
        score = self._score(self.begin(x)[0])
        deep = score > policy.tau  # nobody waits for it, so that what it costs is not known
        return self.net.per_image(x, self._rows(deep)), Decision(score, deep, None)

    def features(self, x: Any, deep: bool = False) -> Sequence[Tensor]:
        """What the router sees of a batch, and scores; of a stream that of the one or the other route."""
        if self.at is not None:
            inside = _Inside(self, None)
            with contextlib.suppress(_Done):
                self.net.per_image(x, inside)
            return [inside.features]
        return self.run(x, deep)[1] if self.taps else self.begin(x)[0]

    def score(self, x: Any) -> Tensor:
        return self._score(self.features(x), 0)

    def run(self, x: Any, deep: bool) -> tuple[Any, Sequence[Tensor]]:
        if not self.taps:
            return super().run(x, deep)
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

    def _route_inside(self, x: Any, policy: Policy) -> tuple[Any, Decision]:
        inside = _Inside(self, policy)
        outputs = self.net.per_image(x, inside)
        cost = None if inside.deep.is_cuda else cost_of(policy, inside.deep)
        return outputs, Decision(inside.score, inside.deep, cost)

    def _rows(self, deep: Tensor) -> Tensor:
        """int32 (flags, B): of each image the entries of its depth."""
        columns = torch.tensor([[int(entry) for entry in depth] for depth in self.depths], dtype=torch.int32)
        return columns.to(deep.device)[deep.long()].T.contiguous()

    def _check_place(self, at: int) -> None:
        if not isinstance(self.net, FusedNet) or self.decide != "within":
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


class _Done(Exception):
    """The features are known, and nothing else was asked for."""


class _Inside:
    """What a deploy form asks for the entries of each image: of flag `at` it makes the decision.

    Attributes:
        features: the input of what depends on that flag.
        score, deep: (B,), once they are known.
    """

    def __init__(self, routed: RoutedNet, policy: Policy | None) -> None:
        self.routed, self.policy = routed, policy
        self.features: Tensor | None = None
        self.score: Tensor | None = None
        self.deep: Tensor | None = None

    def __call__(self, k: int, features: Tensor) -> Tensor:
        shallow, deep = (int(depth[k]) for depth in self.routed.depths)
        if k == self.routed.at:
            self.features = features
            if self.policy is None:
                raise _Done
            self.score = self.routed._score([features])
            self.deep = self.score > self.policy.tau
        if shallow == deep:
            return torch.full((len(features),), shallow, dtype=torch.int32, device=features.device)
        return torch.where(self.deep, deep, shallow).to(torch.int32)


def _square(image: Tensor, size: int) -> Tensor:
    """One of a list of images, as an `ImageRouter` sees it."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
