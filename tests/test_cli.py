from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import adn
import adn.tasks
from adn.cli import build_parser, main
from adn.measure.accuracy import Row

COMMANDS = ["demo", "scenes", "train", "eval", "predict", "detect", "profile", "calibrate", "route", "export"]


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_commands() -> None:
    assert list(commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"adn {command}" in text[text.index("example"):], "help shows how the command is called"
    for action in commands()[command]._actions:
        assert action.help, f"{action.option_strings or action.dest} is not explained"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "adn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"adn {adn.__version__}\n"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["profile", "--checkpoint", "nowhere.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adn profile: error: ")
    assert "nowhere.safetensors" in error
    assert error.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        main(["profile", "--checkpoint", "nowhere.safetensors", "--traceback"])


def test_a_command_is_needed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


@pytest.mark.parametrize(("command", "message"), [
    ("profile --model resnet18 --budget -1", "--budget -1; pass milliseconds"),
    ("profile --model resnet18 --budget nan", "--budget nan; pass milliseconds"),
    ("profile --model resnet18 --plot a.xyz", "a.xyz: a figure is written as one of .*png"),
    ("profile --model resnet18 --device gpu", "--device gpu: there is no such kind of device; pass cpu, cuda"),
    ("profile --model resnet18 --depth 0011", "0011 is FFTT"),
])
def test_what_cannot_work_is_said_before_anything_is_measured(
    command: str, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adn.cli.profile.profile", lambda *_, **__: pytest.fail("it measures"))
    assert main(command.split()) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["profile --model resnet18 --devce cpu", "train photos --out x --epocs 3"])
def test_an_unknown_option_shows_the_usage_of_its_command(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: adn {command.split()[0]} ")
    assert command.split()[-2] in error.splitlines()[-1]


def test_a_net_that_was_only_converted_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of its shallower depths, which nothing has been taught; and a folder stands for the images in it."""
    net = adn.create_model("anydepth_resnet18", num_classes=3)
    file, photos = tmp_path / "net.safetensors", tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(photos / name)
    adn.save(net, file)
    command = ["predict", str(photos), "--checkpoint", str(file)]
    warning = "never trained as an any-depth net"
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.out.count(".png") == 2
    assert warning not in output.err
    assert main([*command, "--depth", "TFFF"]) == 0
    assert warning in capsys.readouterr().err
    with torch.no_grad():
        net.layer1[0].bn1.skip.bias += 0.1
    adn.save(net, file)
    assert main([*command, "--depth", "TFFF"]) == 0
    assert warning not in capsys.readouterr().err


def test_images_of_few_bits_are_said_to_be_dark(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adn.save(adn.create_model("anydepth_resnet18", num_classes=3), tmp_path / "net.safetensors")
    pixels = np.linspace(0, 4095, 1600).astype(np.uint16).reshape(40, 40)
    Image.frombytes("I;16", (40, 40), pixels.tobytes()).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "net.safetensors")]) == 0
    assert "multiply them by 16" in capsys.readouterr().err


def test_depths_that_guess_are_told(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name / "0.png")
    net = adn.create_model("anydepth_resnet18", num_classes=3)
    with torch.no_grad():
        net.layer1[0].bn1.skip.bias += 0.1
    adn.save(net, tmp_path / "net.safetensors")
    measured = {"TTTT": 95.0, "FFFF": 36.0}

    def evaluate(net: nn.Module, _: object, depths: list, *__: object, **___: object) -> list[Row]:
        return [Row(depth, measured[str(depth)], 100.0, 1.0, 3) for depth in depths]

    monkeypatch.setitem(adn.tasks.TASKS, "classify", dataclasses.replace(adn.tasks.CLASSIFY, evaluate=evaluate))
    command = ["eval", str(tmp_path / "photos"), "--checkpoint", str(tmp_path / "net.safetensors"), "--depth"]
    assert main([*command, "TTTT,FFFF"]) == 0
    assert "this depth does no better than guessing and may never have been trained: FFFF" in capsys.readouterr().err
    measured["FFFF"] = 37.0  # a twentieth of the way from a third to 95 %
    for depths in ("TTTT,FFFF", "FFFF"):
        assert main([*command, depths]) == 0
        assert "guessing" not in capsys.readouterr().err
