"""The folder of a training run: its files, how they are written, and what a resumed run reads from them."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..core.files import atomic_write
from ..core.state import is_converted
from ..weights.checkpoint import save

FORMAT = 1
CONFIG, LOG, LAST, BEST, FINAL, INTERRUPTED = (
    "config.json", "log.csv", "last.pt", "best.safetensors", "model.safetensors", "interrupted.json")
FILES = (CONFIG, LOG, LAST, BEST, FINAL, INTERRUPTED)


class RunFolder:
    """The files of a run. Every one is replaced as a whole: an OSError on the way leaves the former one.

    Args:
        path: the folder; None = there is none, and methods that write do nothing.
        writes: False for all processes of a run but the first.
    """

    def __init__(self, path: str | os.PathLike[str] | None, writes: bool) -> None:
        self.path = None if path is None else Path(path)
        self.writes = writes and self.path is not None

    def make(self, overwrite: bool) -> None:
        """Make the folder; with `overwrite` the run that is in it goes.

        Raises:
            ValueError: if there is a run and it is not to be overwritten.
            OSError: if the folder cannot be made.
        """
        if not self.writes:
            return
        if not overwrite:
            refuse_overwriting(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot make the folder {self.path} ({error.strerror}); choose another one by "
                          "--out") from error
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)

    def read_state(self) -> dict[str, Any]:
        """What `write_state` wrote, in any process.

        Raises:
            ValueError: if there is no folder or no state in it, or it is damaged or of another format.
        """
        if self.path is None:
            raise ValueError("nothing to resume: pass the folder of the run as `out`")
        path = self.path / LAST
        if not path.exists():
            raise ValueError(f"nothing to resume in {self.path}: there is no {LAST}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = state["format"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged, or no state of a training run ({error})") from error
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}, this version of adn reads {FORMAT}")
        return state

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Everything that resuming needs."""
        if not self.writes:
            return
        with atomic_write(self.path / LAST) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:
                # What the file raised, e.g. on a full disk, is hidden behind an error of torch's writer.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def write_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """One row per epoch."""
        if not self.writes or not history:
            return
        names = list(dict.fromkeys(name for row in history for name in row))
        with atomic_write(self.path / LOG) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in history:
                writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                                 for name, value in row.items()})

    def write_net(self, name: str, net: nn.Module, extra: Mapping[str, Any]) -> None:
        """A file of `adn.save` with `extra` in it; the weights alone of a plain net."""
        if not self.writes:
            return
        if is_converted(net):
            save(net, self.path / name, extra=extra)
        else:
            with atomic_write(self.path / name) as temporary:
                safetensors.torch.save_model(net, str(temporary))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.writes:
            with atomic_write(self.path / name) as temporary:
                temporary.write_text(json.dumps(dict(value), indent=2) + "\n")

    def take_interruption(self) -> tuple[int, int] | None:
        """Epoch, counted from 1, and steps at which the run was interrupted, if it was; the note goes."""
        if not self.writes or not (path := self.path / INTERRUPTED).exists():
            return None
        noted = json.loads(path.read_text())
        path.unlink()
        return noted["epoch"], noted["steps"]

    def tensorboard_writer(self) -> Callable[[int], Any] | None:
        """What makes the writer, from the next epoch counted from 0, once the folder is there; a missing package is
        noticed before."""
        if not self.writes:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard is not installed: pip install "adn[tensorboard]"') from error
        return lambda epoch: SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch + 1)


def read_config(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `fit` wrote as `config.json`; None if it is not there, or something else."""
    try:
        config = json.loads(Path(out, CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def holds_run(out: Path) -> bool:
    """Is there something in the folder that `overwrite` would destroy? (Settings alone are what a full disk leaves.)"""
    return any((out / name).exists() for name in (LAST, BEST, FINAL, LOG))


def refuse_overwriting(out: Path) -> None:
    """Raise ValueError if there is a run in the folder."""
    if holds_run(out):
        raise ValueError(f"{out} holds a run already: go on with it by --resume, replace it by --overwrite, or choose "
                         "another folder")
