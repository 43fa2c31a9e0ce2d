from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

import adn
from adn.cli import build_parser, main

COMMANDS = ["demo", "scenes", "train", "eval", "predict", "detect", "profile", "calibrate"]


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
