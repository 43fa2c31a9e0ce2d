"""The training loop: `fit` trains a net on batches, keeps a log and checkpoints, and can be stopped and resumed.

Every random number drawn in an epoch follows from (seed, epoch, process): `fit` seeds Python, NumPy and torch at the
start of each. So an epoch that was interrupted is repeated exactly, and there is no state of a generator to keep.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adn_kernels.private import pytree

from ..convert import convert_sync_batchnorm
from ..core.progress import progress_bar
from ..core.state import is_converted, state_of
from ..measure.passes import autocast, moved, of_all_processes, processes
from ..settings import Settings
from ..tasks import CLASSIFY
from .folder import BEST, CONFIG, FINAL, INTERRUPTED, LAST, RunFolder
from .interrupts import Interrupts
from .optim import WeightAverage, create_optimizer, create_scheduler, warm_momentum
from .seeds import seed_all

Batch = tuple[torch.Tensor, Any]
Batches = Callable[[int], Iterable[Batch | None]]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

# Settings that a resumed run must share with its beginning, since the saved state has their shape.
_FIXED = ("model", "model_kwargs", "optimizer", "ema", "twins")
# Losses on an accelerator are looked at this often: each look waits for it.
_STEPS_PER_LOOK = 50


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the message says where, and what is saved."""


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


@dataclasses.dataclass
class Result:
    """What training gives.

    Attributes:
        net: the net after the last epoch, in evaluation mode; its weight average where the recipe keeps one.
        history: one row per epoch, as in `log.csv`.
        best: the best score of an epoch, the mean of its accuracies; None if none was measured.
        out: the folder of the run, if it has one.
    """

    net: nn.Module
    history: list[dict[str, Any]]
    best: float | None
    out: Path | None


def _make_fast(net: nn.Module, recipe: Settings) -> None:
    if not is_converted(net):
        if recipe.compile:
            net.compile()
        return
    # Here, as they take seconds to import.
    from ..runtime import accelerate, compile

    if recipe.accelerate:
        accelerate.accelerate(net)
    if recipe.compile:
        compile.compile(net)


def fit(
    net: nn.Module,
    batches: Batches,
    evaluate: Evaluate | None,
    recipe: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    loss: nn.Module | None = None,
    accuracy: str = CLASSIFY.score,
    device: torch.device | str | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> Result:
    """Train a net, any-depth or plain, by a recipe.

    In a process group (`torch.distributed`), every process calls this with its own share of the batches; gradients are
    averaged, the first process writes and prints. Global random generators are seeded from the recipe, and on the
    main thread Ctrl-C is held back until a step is complete (a second one is not).

    Args:
        net: trained in place. A plain one learns from labels only.
        batches: epoch, counted from 0, to the batches of that epoch: images (B, ...) and targets as the loss takes
            them, for classifiers indices (B,) or rows (B, classes); None is passed over. Must depend on nothing but the
            epoch and the global generators.
        evaluate: net to numbers by name, after every epoch, all processes at once.
        recipe: its settings of optimisation, schedule, loss and averaging are used here; those of model, augmentation
            and images are the business of `batches`.
        out: folder for `config.json`, `log.csv`, `last.pt` (all that resuming needs), `best.safetensors` (of the
            epoch with the highest mean accuracy) and, at the end, `model.safetensors`. None = write nothing.
        resume: go on after the last complete epoch in `out`.
        overwrite: replace a run that is in `out`.
        loss: module around the net that gives a dict with `loss` when called on a batch; None = `default_loss`. If it
            has a method `backward` like that of `SelfDistillation`, that is used where one process runs alone. If its
            `summed` is true, losses are sums over images: gradients of batches and processes add up, else their mean
            is taken.
        accuracy: a part, between underscores, of the names of numbers of `evaluate` that are accuracies in percent
            ("AP" of "val_AP_super"); the mean of these decides which epoch is best.
        device: None = the current accelerator in a process group with NCCL, else where the net is.
        config: JSON to keep as `config.json`.
        extra: JSON to keep in the checkpoints, see `adn.save`.
        tensorboard: also write the log for TensorBoard, under `out`.
        progress: print a line per epoch, and show a bar if in a terminal.

    Raises:
        Diverged: when the loss or a weight is not finite; the checkpoints hold the last good epoch.
        Interrupted: (a KeyboardInterrupt) after Ctrl-C; the interrupted epoch starts again when resumed.
        ValueError: on a run in `out` and neither `resume` nor `overwrite`, a saved run that does not fit, no batches.
        OSError: if `out` cannot be written; what was written before is intact.
    """
    run = _Run(net, recipe, loss, accuracy, _device(net, device), out, extra or {}, progress)
    config = {"recipe": recipe.to_dict()} if config is None else config
    start = time.perf_counter()
    make_writer = run.folder.tensorboard_writer() if tensorboard else None
    if resume:
        run.resume(config)
    else:
        run.begin(overwrite, config)
    writer = make_writer(run.epoch) if make_writer else None
    try:
        with Interrupts() as interrupts:
            while run.epoch < recipe.epochs:
                run.train_epoch(batches, evaluate, interrupts)
                if writer:
                    for name, value in run.history[-1].items():
                        writer.add_scalar(name, value, run.epoch)
                interrupts.check()
    except KeyboardInterrupt as error:
        raise run.interrupted() from error
    finally:
        if writer:
            writer.close()
    run.write_net(FINAL)
    if run.folder.path:
        run.say(f"done in {_duration(time.perf_counter() - start)}: {run.folder.path / FINAL}")
    return Result(run.evaluated.eval(), run.history, run.best, run.folder.path)


class _Run:
    """The state of a run, and what is done to it."""

    def __init__(self, net: nn.Module, recipe: Settings, loss: nn.Module | None, accuracy: str, device: torch.device,
                 out: str | Path | None, extra: Mapping[str, Any], progress: bool) -> None:
        self.recipe, self.accuracy, self.device, self.extra = recipe, accuracy, device, extra
        self.rank, self.world = processes()
        self.talk = progress and self.rank == 0
        self.folder = RunFolder(out, writes=self.rank == 0)
        if recipe.sync_bn and self.world > 1 and device.type == "cpu":
            raise ValueError("torch has batch norms synchronised between processes for GPUs only: pass --no-sync-bn")
        if recipe.sync_bn:
            net = convert_sync_batchnorm(net) if is_converted(net) else nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.memory_format = torch.channels_last if recipe.channels_last else torch.preserve_format
        self.net = net.to(device, memory_format=self.memory_format)
        _make_fast(net, recipe)
        self.loss = (CLASSIFY.loss(net, recipe) if loss is None else loss).to(device)
        self.optimizer = create_optimizer(net, recipe)
        self.scheduler = create_scheduler(self.optimizer, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.ema = WeightAverage(net, recipe, self.world) if recipe.ema else None
        self.epoch = self.steps = 0  # complete epochs; batches of the next one
        self.pending = 0  # of these, those whose gradients wait for the optimizer
        self.history: list[dict[str, Any]] = []
        self.best: float | None = None
        self.parallel = self.loss
        if self.world > 1:
            self.parallel = DistributedDataParallel(self.loss, [device] if device.type == "cuda" else None)

    @property
    def evaluated(self) -> nn.Module:
        return self.net if self.ema is None else self.ema.module

    def say(self, text: str) -> None:
        if self.talk:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------------ one epoch

    def train_epoch(self, batches: Batches, evaluate: Evaluate | None, interrupts: Interrupts) -> None:
        began = time.perf_counter()
        row = self._train(batches, interrupts)
        metrics = self._evaluate(evaluate) if evaluate is not None else {}
        interrupts.check()
        row |= {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        interrupts.hold = True
        self._end_epoch(row | {"seconds": time.perf_counter() - began})
        interrupts.hold = False

    def _train(self, batches: Batches, interrupts: Interrupts) -> dict[str, Any]:
        recipe, epoch = self.recipe, self.epoch
        seed_all(recipe.seed, epoch, self.rank)
        self._set_rates(epoch)
        self.loss.train()
        loader = batches(epoch)
        count = operator.length_hint(loader)
        if recipe.each_step and not count:
            raise ValueError("the learning rate cannot change with every batch where nobody knows how many there are: "
                             "pass --no-each-step")
        together = max(1, round((recipe.nominal_batch or 1) / (recipe.batch_size * self.world)))
        total: dict[str, torch.Tensor] = {}  # sums over images: batches need not be of one size
        images = updates = 0
        look_every = 1 if self.device.type == "cpu" else _STEPS_PER_LOOK
        self.steps = 0
        steps = progress_bar(loader, desc=f"epoch {epoch + 1}/{recipe.epochs}", unit="step", show=self.talk)
        with steps:
            for x, y in self._readable(steps):
                interrupts.hold = True
                if recipe.each_step:
                    self._set_rates(epoch + self.steps / count)
                losses = self._backward(x, y)
                if self.pending == together:
                    updates = self._update(updates)
                for name, value in losses.items():
                    if value.ndim == 0:
                        total[name] = value.detach() * len(x) + total.get(name, 0)
                images += len(x)
                if self.steps % look_every == 0:
                    loss = self._check_finite(total["loss"])
                    steps.set_postfix(loss=f"{loss / images:.4f}", refresh=False)
                self.steps += 1
                interrupts.hold = False
                interrupts.check()
        interrupts.check()
        if self.pending:
            self._update(updates)
        if not total:
            raise ValueError(f"epoch {epoch + 1} has no batch to train on: there are no images, or none could be read")
        self._check_finite(total["loss"])
        self._check_weights()
        return {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "steps": self.steps,
                **{f"train_{name}": value for name, value in self._means(total, images).items()}}

    def _readable(self, loader: Iterable[Batch | None]) -> Iterator[Batch]:
        for batch in loader:
            if batch is not None:
                yield batch
            elif self.world > 1:
                raise RuntimeError("a whole batch of unreadable images in one of several processes; they cannot go on "
                                   "together: remove the damaged files")

    def _set_rates(self, epoch: float) -> None:
        self.scheduler.step(epoch)
        warm_momentum(self.optimizer, self.recipe, epoch)

    def _backward(self, x: torch.Tensor, y: Any) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, the mean of all processes."""
        recipe = self.recipe
        x = moved(x, self.device, memory_format=self.memory_format)
        y = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), y)
        if not self.pending:
            self.optimizer.zero_grad()
        self.pending += 1
        # One backward per pass needs less memory, but DDP wants all of a step in one forward.
        in_two = self.world == 1 and hasattr(self.loss, "backward")
        try:
            with autocast(self.device, recipe.amp):
                losses = self.loss.backward(x, y, self.scaler) if in_two else self.parallel(x, y)
        except FloatingPointError as error:
            raise self._diverged(f"{error} (epoch {self.epoch + 1}, step {self.steps + 1})") from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"batch norm cannot learn from one value per channel ({error}): a batch of {len(x)} at this image size "
                "has no variance. Use a larger batch size, or larger images") from error
        if not in_two:
            self.scaler.scale(losses["loss"]).backward()
        return losses

    def _update(self, updates: int) -> int:
        """A step of the optimizer with the gradients of all batches since the last one; how many steps there were."""
        factor = self.world if getattr(self.loss, "summed", False) else 1 / self.pending
        if factor != 1:
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.pending = 0
        if self.ema is not None and updates % self.recipe.ema_every == 0:
            self.ema.update_in(self.epoch, self.net)
        return updates + 1

    def _evaluate(self, evaluate: Evaluate) -> Mapping[str, float]:
        if self.world > 1:
            # Running statistics are those of each process's own images; all evaluate, and save, the first one's.
            for buffer in self.evaluated.buffers():
                dist.broadcast(buffer, 0)
        self.evaluated.eval()
        return evaluate(self.evaluated)

    def _end_epoch(self, row: dict[str, Any]) -> None:
        self.epoch += 1
        self.steps = 0
        self.history.append(row)
        accuracies = {name: value for name, value in row.items() if self.accuracy in name.split("_")}
        score = sum(accuracies.values()) / len(accuracies) if accuracies else None
        improved = score is not None and (self.best is None or score > self.best)
        if improved:
            self.best = score
        width = len(str(self.recipe.epochs))
        parts = [f"epoch {self.epoch:>{width}}/{self.recipe.epochs}", f"lr {row['lr']:.3g}",
                 f"loss {row['train_loss']:.4f}",
                 *(f"{name.replace('val_', '').replace(f'{self.accuracy}_', '')} {value:.2f} %" for name, value in
                   accuracies.items()),
                 _duration(row["seconds"]), "best so far" if improved else ""]
        self.say("  ".join(filter(None, parts)))
        # The state comes after the net: a run that ends in between repeats the epoch, and writes the same net again.
        if improved:
            self.write_net(BEST)
        self.write_last()
        self.folder.write_log(self.history)

    # ---------------------------------------------------------------------------------------- beginning and resuming

    def begin(self, overwrite: bool, config: Mapping[str, Any]) -> None:
        self.folder.make(overwrite)
        self.folder.write_json(CONFIG, config)
        if 0 < self.recipe.epochs <= self.recipe.warmup_epochs:
            self.say(f"warning: all of the {self.recipe.epochs} epochs are warm-up (--warmup-epochs "
                     f"{self.recipe.warmup_epochs}), so the learning rate stays below {self.recipe.lr:g}")
        self.write_last()

    def resume(self, config: Mapping[str, Any]) -> None:
        state, out = self.folder.read_state(), self.folder.path
        try:
            before = type(self.recipe).from_dict(state["recipe"])
        except ValueError as error:
            raise ValueError(f"the run in {out} trains something else: {error}") from error
        self._compare(before, state["world"])
        names = self._class_names()
        if names and state.get("class_names") not in (None, names):
            raise ValueError(f"the run in {out} was for other classes than those of the data now: it was for "
                             f"{', '.join(state['class_names'][:5])}, ..., these are {', '.join(names[:5])}, ...")
        try:
            self.net.load_state_dict(state["net"])
            # Loading puts the saved hyper-parameters into the groups, where those of this recipe belong.
            fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{out / LAST} does not fit this net: {error}") from error
        for group, values in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.started, self.ema.updates = state["ema_started"], state.get("ema_updates", 0)
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        if self.epoch > self.recipe.epochs:
            raise ValueError(f"the run in {out} has {self.epoch} epochs already; pass --epochs {self.epoch} or "
                             "more")
        self._say_where()
        self.folder.write_json(CONFIG, config)
        self.folder.write_log(self.history)

    def _say_where(self) -> None:
        stopped = self.folder.take_interruption()
        if self.epoch == self.recipe.epochs:
            self.say(f"all {self.epoch} epochs of {self.folder.path} are done; --epochs with a larger number goes on")
        elif stopped and stopped[0] == self.epoch + 1:
            self.say(f"epoch {stopped[0]} was interrupted after {stopped[1]} steps: it starts again from its beginning")
        else:
            self.say(f"going on with epoch {self.epoch + 1} of {self.recipe.epochs}")

    def _compare(self, before: Settings, world: int) -> None:
        old, new = (json.loads(json.dumps(recipe.to_dict())) for recipe in (before, self.recipe))
        changed = [name for name in new if new[name] != old[name]]
        if fixed := [name for name in changed if name in _FIXED]:
            raise ValueError("a run cannot be resumed with another " + ", ".join(
                f"{name} ({old[name]!r}, now {new[name]!r})" for name in fixed) + "; start a new one in another folder")
        if "epochs" in changed:
            self.say(f"{old['epochs']} epochs have become {new['epochs']}"
                     + ("; the learning rate goes on along the cosine over all of them, so it jumps here"
                        if self.recipe.schedule == "cosine" else ""))
        for name in changed:
            if name != "epochs":
                self.say(f"warning: {name} was {old[name]!r}, and is {new[name]!r} from here on")
        if world != self.world:
            self.say(f"warning: {world} processes have become {self.world}, so the batch of a step is another")

    def _class_names(self) -> list[str] | None:
        return state_of(self.net).class_names if is_converted(self.net) else None

    def write_last(self) -> None:
        self.folder.write_state({
            "recipe": self.recipe.to_dict(), "world": self.world, "epoch": self.epoch, "history": self.history,
            "best": self.best, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "ema": self.ema and self.ema.module.state_dict(),
            "ema_started": self.ema is not None and self.ema.started,
            "ema_updates": 0 if self.ema is None else self.ema.updates, "class_names": self._class_names(),
        })

    def write_net(self, name: str) -> None:
        last = self.history[-1] if self.history else {}
        about = {"recipe": self.recipe.to_dict(), "epoch": self.epoch, "log": last, **self.extra}
        self.folder.write_net(name, self.evaluated, about)

    # ------------------------------------------------------------------------------------------------ what can go wrong

    def interrupted(self) -> Interrupted:
        where = f"interrupted in epoch {self.epoch + 1} after {self.steps} steps"
        if self.folder.path is None:
            return Interrupted(f"{where}; nothing was saved, since the run has no folder")
        self.folder.write_json(INTERRUPTED, {"epoch": self.epoch + 1, "steps": self.steps})
        return Interrupted(f"{where}; its beginning is saved in {self.folder.path}, resume to go on from there")

    def _check_finite(self, loss: torch.Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} in epoch {self.epoch + 1}, step {self.steps + 1}")
        return value

    def _check_weights(self) -> None:
        bad = [name for name, value in self.net.state_dict().items()
               if value.is_floating_point() and not torch.isfinite(value).all()]
        if bad:
            raise self._diverged(f"{len(bad)} tensors of the net (first: {bad[0]}) are not finite after epoch "
                                 f"{self.epoch + 1}")

    def _diverged(self, what: str) -> Diverged:
        state = f"after epoch {self.epoch}" if self.epoch else "before the first epoch"
        kept = f" {self.folder.path / LAST} holds the state {state}." if self.folder.path else ""
        half = ", or bf16 or none in place of fp16 (--amp)" if self.recipe.amp == "fp16" else ""
        clip = ", or clip gradients (--clip 1)" if self.recipe.clip is None else ""
        return Diverged(f"{what}.{kept} Try a lower learning rate (--lr, now {self.recipe.lr}), a longer warm-up "
                        f"(--warmup-epochs){clip}{half}")

    def _means(self, sums: Mapping[str, torch.Tensor], images: int) -> dict[str, float]:
        """Per image, over all processes."""
        # Not every batch has every term: a detector's may have no object.
        names = list(dict.fromkeys(itertools.chain(*of_all_processes(list(sums)))))
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        total = torch.stack([*(sums.get(name, zero).double() for name in names), zero + images])
        if self.world > 1:
            dist.all_reduce(total)
        return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))


def _device(net: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return next(net.parameters()).device


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
