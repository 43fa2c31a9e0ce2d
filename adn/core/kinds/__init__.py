"""What can be decided about a part of a net: a kind of choice is a subclass of `Kind`, in a file of its own.

A kind is an entry of a `Plan`, in names of modules: it says which values its entry of the depth has, and what the part
is at each (`form`). Those who convert, extract, cut, compile, count or store ask it that, never which kind it is.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import fx, nn

from ..behaviours import Swapped, original_class, twin_of
from ..errors import ConversionError

KINDS: dict[str, type[Kind]] = {}


@dataclasses.dataclass(frozen=True)
class Form:
    """What a part of a net is at one value of its choice, in names of modules.

    Attributes:
        seconds: those that hold a second set, which is in use.
        bypassed: blocks that are the identity.
        handing_on: those of them that return a tuple of all they are given.
        extras: by name of those of them that return a tuple of their input and others, how many others.
        off: stochastic depth that is.
        lists: how many of the first entries run, of lists of which not all do.
        inputs: how many of their first input channels convolutions read, which is fewer than they have.
    """

    seconds: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    lists: Mapping[str, int] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    handing_on: tuple[str, ...] = ()
    extras: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Follower(NamedTuple):
    """A module that follows a choice.

    Attributes:
        name: of the module.
        how: its behaviour.
        settings: of the behaviour, which finds each as an attribute of the module, `_adn_` and its name.
    """

    name: str
    how: type[Swapped]
    settings: Mapping[str, Any] = MappingProxyType({})


class Kind:
    """The contract. Values of the choice are bools (True: the base-net's) or numbers of layers.

    Attributes:
        kind: what it is called in files.
        name: what the part is called in tables.
        flag: entries of a plan that name the same flag share it; None = one of its own.
        base: the base-net's value.
        units: names of modules each of which runs by itself, as far as compilers are concerned.
        whole: name of the module whose forward itself depends on the value; "" if only modules inside do.
        in_training: does the choice hold in training too, or does everything run there?
        one_forward: may one forward run super-net and base-net?
        names: fields that hold names of modules, one or a list.
    """

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    in_training: ClassVar[bool] = True
    one_forward: ClassVar[bool] = True
    name: str
    flag: str | None = None
    base: bool | int
    units: list[str]
    whole: str = ""

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    def resolve(self, model: nn.Module) -> Kind:
        """The same with every default filled in from the model, and checked; raises `ConversionError`."""
        raise NotImplementedError

    def values(self, model: nn.Module) -> list[bool | int]:
        """Of the choice, that of the super-net first."""
        raise NotImplementedError

    def form(self, value: bool | int) -> Form:
        raise NotImplementedError

    def follow(self) -> Iterator[Follower]:
        """All modules that do."""
        raise NotImplementedError

    def twin(self, module: nn.Module, twins: str) -> nn.Module:
        """A second set for one of the modules that have one in some form; `twins` as for `adn.convert`."""
        return twin_of(module, twins)

    def renamed(self, rename: Callable[[str], str]) -> Kind:
        """The same, of a model in which modules have other names."""
        def of(value: str | list[str] | None) -> str | list[str] | None:
            return rename(value) if isinstance(value, str) else value and [*map(rename, value)]

        return dataclasses.replace(self, **{field: of(getattr(self, field)) for field in self.names})

    @property
    def seconds(self) -> tuple[str, ...]:
        """The names of the modules that have a second set."""
        return self.form(self.base).seconds


def freeze(form: Form, seconds: Mapping[str, nn.Module], place: Callable[[str], tuple[nn.Module, str]],
           remove: bool = False) -> None:
    """Make a plain model, which ran in full, what it is in this form.

    Args:
        seconds: the second sets, by the names of the modules that held them.
        place: from a name to (parent, name of the child).
        remove: take bypassed blocks out of their containers, instead of putting `nn.Identity` there.

    Raises:
        ValueError: `remove` of a block that is not in an `nn.Sequential`.
    """
    def put(name: str, module: nn.Module) -> None:
        parent, child = place(name)
        parent._modules[child] = module.train(parent._modules[child].training)

    for name in form.seconds:
        put(name, seconds[name])
    for name in form.off:
        put(name, nn.Identity())
    for name in form.bypassed:
        parent, child = place(name)
        if not remove:
            put(name, identity_for(parent._modules[child], name in form.handing_on, form.extras.get(name, 0)))
        elif isinstance(parent, nn.Sequential):
            del parent._modules[child]
        else:
            raise ValueError(f"{name!r} is in a {type(parent).__name__}, not in an nn.Sequential, and may be called by "
                             "name: it cannot be removed")
    for name, count in form.lists.items():
        parent, child = place(name)
        del parent._modules[child][count:]
    for name, inputs in form.inputs.items():
        parent, child = place(name)
        put(name, of_first_inputs(parent._modules[child], inputs))


def identity_for(block: nn.Module, hands_on: bool = False, extras: int = 0) -> nn.Module:
    """`nn.Identity`; for a block that may be given more than its input, a module that takes the same and returns it,
    or all of it if the block `hands_on`, or with so many `extras`, None."""
    parameters = list(inspect.signature(original_class(block).forward).parameters.values())[1:]
    if len(parameters) == 1:
        return nn.Identity()
    graph = fx.Graph()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    given = [graph.placeholder(stars.get(p.kind, "") + p.name, default_value=p.default) for p in parameters]
    graph.output(tuple(given) if hands_on else (given[0], *[None] * extras) if extras else given[0])
    return fx.GraphModule(nn.Module(), graph, "Identity")


def of_first_inputs(conv: nn.Conv2d, inputs: int) -> nn.Conv2d:
    """A convolution that reads fewer channels, with the first part of the other's kernel: the same memory."""
    narrow = copy.copy(conv)
    narrow._parameters = dict(conv._parameters)
    weight = conv.weight.detach()[:, :inputs]
    learns = conv.weight.requires_grad and not conv.weight.is_inference()
    narrow._parameters["weight"] = nn.Parameter(weight, requires_grad=learns)
    narrow.in_channels = inputs
    return narrow


def part_in_form(model: nn.Module, name: str, form: Form, seconds: Mapping[str, nn.Module]) -> nn.Module:
    """The part of a plain model that has this name, in a form; shares with it all that is the same."""
    def inside(names: Any) -> Any:
        of_part = {of: f"part{of[len(name):]}" for of in names if f"{of}.".startswith(f"{name}.")}
        return {short: names[of] for of, short in of_part.items()} if isinstance(names, Mapping) else (
            tuple(of_part.values()))

    def place(of: str) -> tuple[nn.Module, str]:
        parent, _, child = of.rpartition(".")
        return holder.get_submodule(parent), child

    form = Form(*(inside(getattr(form, field.name)) for field in dataclasses.fields(form)))
    changed = (*form.seconds, *form.bypassed, *form.off, *form.lists, *form.inputs)
    holder = nn.Module()
    holder.part = _shared(model.get_submodule(name), [of.removeprefix("part.") for of in changed if of != "part"])
    freeze(form, inside(seconds), place)
    return holder.part


def _shared(module: nn.Module, changed: Iterable[str]) -> nn.Module:
    """A copy that shares everything but the modules on the way to those with these names, and them."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    heads: dict[str, list[str]] = {}
    for name in changed:
        head, _, rest = name.partition(".")
        heads.setdefault(head, []).extend([rest] if rest else [])
    for head, rest in heads.items():
        new._modules[head] = _shared(module._modules[head], rest)
    return new


# ------------------------------------------------------------------------------------------------- tools for kinds


def submodule(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        top = ", ".join(child for child, _ in model.named_children())
        raise ConversionError(f"{where} names {name!r}, which this {type(model).__name__} does not have "
                              f"(its children: {top})") from None


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
