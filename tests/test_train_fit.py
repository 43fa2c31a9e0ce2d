"""The training loop: what it computes, and what is left after it stops, for whatever reason."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from conftest import in_two_processes, randomise
from torch import nn

import adn
from adn.core import behaviours
from adn.measure.accuracy import evaluate
from adn.models.registry import create_model
from adn.train import Diverged, Interrupted, Recipe, Result, Supervised, fit
from adn.weights.checkpoint import load, read_metadata

RECIPE = Recipe(epochs=3, batch_size=4, optimizer="adamw", lr=1e-3, norm_decay=0.0, schedule="cosine", clip=1.0)
FULL = RECIPE.but(ema=True, ema_every=2, ema_decay=0.9, warmup_epochs=1, label_smoothing=0.1, amp="bf16")


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(create_model("anydepth_resnet18", num_classes=3, channels=(4, 4, 8, 8), drop_rate=0.2))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(create_model("anydepth_vit_tiny_patch16_224", num_classes=3, img_size=24, patch_size=8, depth=3,
                                  embed_dim=12, num_heads=2))


def images(count: int = 12, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a size at which no map of one pixel is strided over: there torch's gradient of a 3x3 kernel in bfloat16 is, on
    some CPUs, what the memory happened to hold (2.14, oneDNN)."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(count) % 3
    return torch.randn(count, 3, size, size, generator=generator) + y.view(-1, 1, 1, 1), y


def batches(epoch: int, stop: Callable[[int, int], None] = lambda epoch, step: None
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches, in an order and with noise from the global generator, which `fit` seeds."""
    x, y = images()
    order = torch.randperm(12)
    for step, chosen in enumerate(order.split(4)):
        stop(epoch, step)
        yield x[chosen] + 0.1 * torch.randn(4, *x.shape[1:]), y[chosen]


def measure(net: nn.Module) -> dict[str, float]:
    rows = evaluate(net, [images()], ["super", "base"], progress=False)
    return {f"val_top1_{name}": row.top1 for name, row in zip(("super", "base"), rows, strict=True)}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested state as {path: leaf}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer, schedule, average, log."""
    one, two = (flat(torch.load(folder / "last.pt", weights_only=True)) for folder in (a, b))
    one, two = ({k: v for k, v in state.items() if not k.endswith("/seconds")} for state in (one, two))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name], name
    for name in ("model.safetensors", "best.safetensors"):
        x, y = load(a / name).state_dict(), load(b / name).state_dict()
        assert all(torch.equal(x[k], y[k]) for k in x), name


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- one step


def test_settings_for_speed_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(net: nn.Module) -> None:
        compiled.append(net)
        net.compile(backend="eager")

    monkeypatch.setattr("adn.runtime.compile.compile", compile)
    plain, fast = vit().double(), vit().double()
    in_double = [(x.double(), y) for x, y in batches(0)]
    for net, recipe in ((plain, RECIPE), (fast, RECIPE.but(single_pass=True, accelerate=True, compile=True))):
        fit(net, lambda epoch: in_double, None, recipe.but(epochs=1))
    assert compiled == [fast]
    assert isinstance(fast.blocks[0], behaviours.Rerouted)
    for (name, ours), expected in zip(fast.named_parameters(), plain.parameters(), strict=True):
        # Adam divides by the size of a gradient, also where that is nothing but rounding.
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_one_epoch_is_the_plain_loop(tmp_path: Path) -> None:
    """Against ten lines written out: two backwards, clipping of their sum, one step."""
    r = RECIPE.but(epochs=2, optimizer="momentum", lr=0.05, schedule="constant", norm_decay=None, clip=0.5)
    seen: list[list] = []

    def record(epoch: int) -> Iterator:
        seen.append([])
        for batch in batches(epoch):
            seen[-1].append(batch)
            yield batch

    net, plain = (resnet() for _ in range(2))
    net.drop_rate = plain.drop_rate = 0.0
    result = fit(net, record, None, r, progress=False)

    kd = adn.SelfDistillation(plain, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    plain.train()
    for epoch in seen:
        for x, y in epoch:
            optimizer.zero_grad()
            losses.append(kd.backward(x, y)["loss"].item())
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
    for (name, value), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)
    assert [row["train_loss"] for row in result.history] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)
    assert result.net is net
    assert not net.training
    assert [row["steps"] for row in result.history] == [3, 3]


def test_clipping_and_rates_reach_the_optimizer() -> None:
    """A rate of zero moves nothing but statistics; a tiny clip moves little."""
    still = resnet()
    before = {name: p.clone() for name, p in still.named_parameters()}
    fit(still, batches, None, RECIPE.but(epochs=1, lr=0.0), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in still.named_parameters())
    slow = resnet()
    fit(slow, batches, None, RECIPE.but(epochs=1, optimizer="momentum", lr=1.0, weight_decay=0.0, clip=1e-6,
                                        schedule="constant"), progress=False)
    moved = max((p - before[name]).abs().max().item() for name, p in slow.named_parameters())
    assert 0 < moved < 1e-5


class Sum(nn.Module):
    """The sum, or the mean, of the squares of what a net gives."""

    def __init__(self, net: nn.Module, summed: bool) -> None:
        super().__init__()
        self.net, self.summed = net, summed

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        squares = (self.net(x)[:, 0] - y).square()
        return {"loss": squares.sum() if self.summed else squares.mean()}


def in_batches(size: int, batch: int, summed: bool, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    x, y = torch.randn(size, 4), torch.randn(size)
    recipe = Recipe(epochs=2, batch_size=batch, optimizer="momentum", lr=0.01, schedule="constant", **settings)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = [(a[rank::world], b[rank::world]) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    fit(net, lambda epoch: pairs, None, recipe.but(batch_size=batch // world), loss=Sum(net, summed), progress=False)
    return net.weight.detach()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_gradients_of_several_batches(summed: bool, amp: str | None) -> None:
    """Three batches of 4 are as one of 12; of the last step of an epoch there may be fewer."""
    settings = {"clip": 0.5, "amp": amp, "ema": False}
    one, three = in_batches(24, 12, summed, **settings), in_batches(24, 4, summed, nominal_batch=12, **settings)
    torch.testing.assert_close(three, one, rtol=2e-2 if amp else 1e-5, atol=1e-7)
    assert not torch.allclose(three, in_batches(24, 4, summed, **settings), rtol=1e-3)
    torch.testing.assert_close(in_batches(12, 4, summed, nominal_batch=8), in_batches(12, 4, summed, nominal_batch=9))
    eight_and_four = in_batches(12, 8, summed)
    torch.testing.assert_close(in_batches(12, 4, summed, nominal_batch=8), eight_and_four, rtol=1e-5, atol=1e-7)


def test_rates_of_each_step() -> None:
    seen = []

    class Watch(Sum):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(None)
            return super().forward(x, y)

    net, rates = nn.Linear(4, 1), []
    recipe = Recipe(epochs=2, batch_size=4, optimizer="momentum", lr=1.0, schedule="linear", each_step=True)
    x, y = torch.zeros(16, 4), torch.zeros(16)
    loss = Watch(net, summed=False)
    result = fit(net, lambda epoch: list(zip(x.split(4), y.split(4), strict=True)), None, recipe, loss=loss,
                 progress=False)
    rates = [row["lr"] for row in result.history]
    assert rates == pytest.approx([1 - 0.75 / 2, 1 - 1.75 / 2])
    assert len(seen) == 8
    with pytest.raises(ValueError, match="nobody knows how many there are: pass --no-each-step"):
        fit(net, lambda epoch: (batch for batch in [(x, y)]), None, recipe, loss=loss, progress=False)


def test_plain_networks_learn_by_the_same_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=3, channels=(4, 4, 8, 8))
    result = fit(net, batches, lambda net: {"top1": 50.0}, RECIPE.but(epochs=15, lr=5e-3), out=tmp_path, progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert result.best == 50.0
    again = timm.create_model("resnet18", num_classes=3, channels=(4, 4, 8, 8))
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(again.eval()(images()[0]), net(images()[0]))


def test_a_loss_of_ones_own() -> None:
    net = resnet()
    called = []

    class Mine(Supervised):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            called.append(len(y))
            return super().forward(x, y)

    fit(net, batches, None, RECIPE.but(epochs=1), loss=Mine(net, nn.CrossEntropyLoss()), progress=False)
    assert called == [4, 4, 4]


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    net, seen = resnet(), []

    def look(evaluated: nn.Module) -> dict[str, float]:
        seen.append(evaluated)
        return measure(evaluated)

    result = fit(net, batches, look, FULL, out=tmp_path, progress=False)
    assert all(one is result.net for one in seen)
    assert result.net is not net
    stored = load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in result.net.state_dict().items())
    assert any(not torch.equal(value, stored[name]) for name, value in net.state_dict().items())


def test_same_seed_same_numbers() -> None:
    def numbers(seed: int, net_seed: int = 0) -> list[float]:
        return [row["train_loss"] for row in fit(resnet(net_seed), batches, None, RECIPE.but(seed=seed),
                                                 progress=False).history]

    first = numbers(1)
    torch.rand(5)
    assert numbers(1) == first
    assert numbers(2) != first


# ------------------------------------------------------------------------------------------------ stopping and resuming


@pytest.mark.parametrize("recipe", [FULL, RECIPE.but(optimizer="momentum", lr=0.05, amp="fp16", schedule="steps",
                                                     milestones=(1, 2))], ids=["adamw-ema-bf16", "sgd-fp16"])
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (2, 2)])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, recipe: Recipe, where: tuple[int, int],
                                                  capsys: pytest.CaptureFixture) -> None:
    fit(resnet(), batches, measure, recipe, out=tmp_path / "whole", progress=False)

    def interrupt(epoch: int, step: int) -> None:
        if (epoch, step) == where:
            raise KeyboardInterrupt

    out = tmp_path / "parts"
    with pytest.raises(Interrupted, match=rf"epoch {where[0] + 1} after {where[1]} steps.*saved in {out}"):
        fit(resnet(), lambda epoch: batches(epoch, interrupt), measure, recipe, out=out, progress=False)
    assert json.loads((out / "interrupted.json").read_text()) == {"epoch": where[0] + 1, "steps": where[1]}
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == where[0]
    capsys.readouterr()
    torch.rand(11)
    result = fit(resnet(seed=8), batches, measure, recipe, out=out, resume=True)
    said = capsys.readouterr().out
    assert f"epoch {where[0] + 1} was interrupted after {where[1]} steps: it starts again from its beginning" in said
    assert not (out / "interrupted.json").exists()
    assert_same_run(tmp_path / "whole", out)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert [row["epoch"] for row in rows(out)] == ["1", "2", "3"]


def test_a_real_signal_lets_the_step_end(tmp_path: Path) -> None:
    done = []

    class Stopping(adn.SelfDistillation):
        def backward(self, *args: Any) -> dict:
            if len(done) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            losses = super().backward(*args)
            done.append(1)
            return losses

    net = resnet()
    with pytest.raises(Interrupted, match="after 2 steps"):
        fit(net, batches, None, RECIPE, out=tmp_path, loss=Stopping(net), progress=False)
    assert len(done) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_deleter_is_not_lost(tmp_path: Path) -> None:
    """Python drops exceptions raised there, and a loader with workers is deleted at the end of every epoch."""

    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs here, at the latest

    def deleting(epoch: int) -> Iterator:
        yield from batches(epoch)
        thing = Deleted()
        del thing

    with pytest.raises(Interrupted, match="epoch 1 after 3 steps"):
        fit(resnet(), deleting, None, RECIPE, out=tmp_path, progress=False)


def test_interrupted_while_evaluating(tmp_path: Path) -> None:
    def interrupted(_net: nn.Module) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="epoch 1 after 3 steps"):
        fit(resnet(), batches, interrupted, RECIPE, out=tmp_path / "parts", progress=False)
    fit(resnet(), batches, measure, RECIPE, out=tmp_path / "parts", resume=True, progress=False)
    fit(resnet(), batches, measure, RECIPE, out=tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_interrupted_without_a_folder() -> None:
    def stop(epoch: int, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        fit(resnet(), lambda epoch: batches(epoch, stop), None, RECIPE, progress=False)


def test_extending_past_the_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a rate that does not depend on the number of epochs, it is as if the longer run had been asked for."""
    steps = RECIPE.but(schedule="steps", milestones=(2, 3))
    fit(resnet(), batches, measure, steps.but(epochs=4), out=tmp_path / "whole", progress=False)
    fit(resnet(), batches, measure, steps.but(epochs=2), out=tmp_path / "parts", progress=False)
    fit(resnet(), batches, measure, steps.but(epochs=4), out=tmp_path / "parts", resume=True)
    assert "2 epochs have become 4" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_extending_a_cosine_says_that_the_rate_jumps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, progress=False)
    result = fit(resnet(), batches, None, RECIPE.but(epochs=2), out=tmp_path, resume=True)
    assert "it jumps here" in capsys.readouterr().out
    assert result.history[1]["lr"] == pytest.approx(RECIPE.lr / 2)


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(resnet(), batches, measure, RECIPE.but(epochs=1), out=tmp_path, progress=False)
    before = (tmp_path / "last.pt").read_bytes()
    result = fit(resnet(seed=4), batches, measure, RECIPE.but(epochs=1), out=tmp_path, resume=True)
    assert "all 1 epochs" in capsys.readouterr().out
    assert (tmp_path / "last.pt").read_bytes() == before
    stored = load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in result.net.state_dict().items())


def test_resuming_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, progress=False)
    changed = RECIPE.but(weight_decay=0.5, norm_decay=0.25, lr=1e-4, schedule="constant")
    fit(resnet(), batches, None, changed, out=tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "warning: weight_decay was 0.0001, and is 0.5 from here on" in said
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.5, 1e-4), (0.25, 1e-4), (0.5, 1e-4)]
    with pytest.raises(ValueError, match=r"another optimizer \('adamw', now 'momentum'\)"):
        fit(resnet(), batches, None, changed.but(epochs=5, optimizer="momentum"), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another ema"):
        fit(resnet(), batches, None, changed.but(epochs=5, ema=True), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="has 3 epochs already; pass --epochs 3 or more"):
        fit(resnet(), batches, None, changed.but(epochs=2), out=tmp_path, resume=True)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    fit(resnet(), batches, measure, RECIPE.but(epochs=2), out=tmp_path, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a run already.*--resume.*--overwrite"):
        fit(resnet(), batches, measure, RECIPE, out=tmp_path, progress=False)
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, overwrite=True, progress=False)
    assert len(rows(tmp_path)) == 1
    assert not (tmp_path / "best.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["absent", "cut", "other", "pickle"])
def test_resuming_from_nothing_useful(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    if damage == "cut":
        fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, progress=False)
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "other":
        torch.save({"state_dict": {}}, path)
    elif damage == "pickle":
        torch.save({"format": 1, "net": Path("x")}, path)
    with pytest.raises(ValueError, match="nothing to resume" if damage == "absent" else "damaged, or no state"):
        fit(resnet(), batches, None, RECIPE, out=tmp_path, resume=True, progress=False)


def test_resuming_another_net(tmp_path: Path) -> None:
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="does not fit this net"):
        fit(vit(), batches, None, RECIPE, out=tmp_path, resume=True, progress=False)


# ---------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(tmp_path: Path, value: float) -> None:
    def poisoned(epoch: int) -> Iterator:
        for step, (x, y) in enumerate(batches(epoch)):
            yield (x * value if (epoch, step) == (1, 1) else x), y

    with pytest.raises(Diverged, match=r"epoch 2, step 2.*last.pt holds the state after epoch 1.*--lr.*--amp"):
        fit(resnet(), poisoned, measure, RECIPE.but(amp="fp16"), out=tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["net"].values())
    fit(resnet(), batches, measure, RECIPE.but(amp="fp16"), out=tmp_path, resume=True, progress=False)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The last step of an epoch may spoil the weights after a finite loss."""

    def spoiling(epoch: int) -> Iterator:
        yield from batches(epoch)
        with torch.no_grad():
            net.conv1.weight[0] = float("nan")

    net = resnet()
    with pytest.raises(Diverged, match=r"conv1.weight.*after epoch 1"):
        fit(net, spoiling, None, RECIPE, out=tmp_path, progress=False)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 0


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="no batch to train on"):
        fit(resnet(), lambda epoch: [None], None, RECIPE, progress=False)


def test_a_batch_of_one() -> None:
    x, y = images()
    with pytest.raises(ValueError, match=r"batch norm cannot learn.*larger batch size"):
        fit(resnet(), lambda epoch: [(x[:1], y[:1])], None, RECIPE, progress=False)
    fit(vit(), lambda epoch: [(x[:1], y[:1])], None, RECIPE.but(epochs=1), progress=False)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot make the folder.*--out"):
        fit(resnet(), batches, None, RECIPE, out=tmp_path / "file" / "run", progress=False)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops, and what was saved before is whole."""
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, progress=False)
    before = (tmp_path / "last.pt").read_bytes()
    real = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10_000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    monkeypatch.setattr(Path, "open", lambda self, mode="r", **kw: Full(real(self, mode, **kw)) if mode == "wb"
                        else real(self, mode, **kw))
    with pytest.raises(OSError, match=r"cannot write .*last.pt: No space left on device"):
        fit(resnet(), batches, None, RECIPE, out=tmp_path, resume=True, progress=False)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------------- what is left over


def test_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = iter([40.0, 60.0, 50.0])

    def score(net: nn.Module) -> dict[str, float]:
        value = next(scores)
        return {"val_top1_super": value + 10, "val_top1_base": value - 10, "val_loss_super": 1.0}

    out = tmp_path / "new" / "run"
    result = fit(resnet(), batches, score, RECIPE, out=out, config={"mine": 1}, extra={"data": {"size": 16}})
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.csv", "last.pt", "best.safetensors", "model.safetensors"}
    assert result.best == 60.0
    assert json.loads((out / "config.json").read_text()) == {"mine": 1}
    best, last = (read_metadata(out / name)["extra"] for name in ("best.safetensors", "model.safetensors"))
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert best["data"] == {"size": 16}
    assert Recipe.from_dict(last["recipe"]) == RECIPE
    table = rows(out)
    assert [row["val_top1_super"] for row in table] == ["50", "70", "60"]
    assert {"lr", "train_loss", "train_super", "train_base", "train_kl_logits", "seconds"} <= table[0].keys()
    assert float(table[0]["train_loss"]) == pytest.approx(
        float(table[0]["train_super"]) + float(table[0]["train_base"]), rel=1e-4)
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("epoch 2/3  lr 0.00075  loss ")
    assert "super 70.00 %  base 50.00 %" in said[1]
    assert [("best so far" in line) for line in said[:3]] == [True, True, False]


def test_a_warmup_longer_than_the_run_is_pointed_out(capsys: pytest.CaptureFixture) -> None:
    fit(resnet(), batches, None, RECIPE.but(epochs=1, warmup_epochs=3))
    assert "warning: all of the 1 epochs are warm-up" in capsys.readouterr().out


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"adn\[tensorboard\]"):
        fit(resnet(), batches, None, RECIPE, out=tmp_path, tensorboard=True, progress=False)

    written = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    fit(resnet(), batches, None, RECIPE.but(epochs=1), out=tmp_path, overwrite=True, tensorboard=True, progress=False)
    assert written[0] == ("tensorboard", 1)
    assert ("train_loss", 1) in written
    assert written[-1] == "closed"


# -------------------------------------------------------------------------------------------------- several processes


def halves(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each process takes its half of every batch; a single one takes it whole."""
    x, y = images()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
    for chosen in order.split(4):
        mine = chosen[rank::world]
        yield x[mine], y[mine]


def trained(out: Path) -> Result:
    recipe = RECIPE.but(epochs=2, optimizer="momentum", lr=0.05)
    return fit(vit(), halves, measure, recipe, out=out, progress=False)


def one_of_two(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = trained(Path(out))
    torch.save(result.net.state_dict(), f"{out}-{rank}.pt")
    torch.save([in_batches(24, 6, summed, nominal_batch=12) for summed in (False, True)], f"{out}-{rank}-sums.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_both_halves(tmp_path: Path) -> None:
    in_two_processes(one_of_two, str(tmp_path / "store"), str(tmp_path / "two"))
    alone = trained(tmp_path / "one")
    nets = [torch.load(f"{tmp_path / 'two'}-{rank}.pt") for rank in (0, 1)]
    for name, value in alone.net.state_dict().items():
        assert torch.equal(nets[0][name], nets[1][name])
        torch.testing.assert_close(nets[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
        assert a["val_top1_base"] == b["val_top1_base"]
    assert {path.name for path in (tmp_path / "two").iterdir()} >= {"last.pt", "model.safetensors", "log.csv"}
    for i, summed in enumerate((False, True)):
        expected = in_batches(24, 6, summed, nominal_batch=12)
        for rank in (0, 1):
            torch.testing.assert_close(torch.load(f"{tmp_path / 'two'}-{rank}-sums.pt")[i], expected)


def test_the_logged_loss_is_per_image() -> None:
    """Batches need not be of one size."""
    net = nn.Linear(2, 3)

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).sum() * 0 + y.float().mean()}

    batches = [(torch.zeros(9, 2), torch.ones(9)), (torch.zeros(1, 2), torch.full((1,), 11.0))]
    result = fit(net, lambda _epoch: batches, None, Recipe(epochs=1), loss=Known(), progress=False)
    assert result.history[0]["train_loss"] == pytest.approx(2.0)
