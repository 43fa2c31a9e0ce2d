"""What is shown while something takes long, in a terminal and elsewhere."""

from __future__ import annotations

import time

import pytest

from adn.core import progress


def test_a_line_now_and_then_where_lines_cannot_be_written_over(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    for i in (bar := progress.progress_bar(range(40), desc="epoch 1/3", unit="step", show=True)):
        bar.set_postfix(loss=f"{i / 10:.4f}", refresh=False)
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert all(line.startswith("epoch 1/3: ") and "/40 steps, " in line and "loss=" in line for line in lines)


@pytest.mark.parametrize("show", [True, False])
def test_what_is_quick_prints_nothing_there(show: bool, capsys: pytest.CaptureFixture) -> None:
    assert list(progress.progress_bar([1, 2, 3], desc="evaluate", unit="batch", show=show)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_a_bar_that_goes_away(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for _ in progress.progress_bar(range(3), desc="evaluate", unit="batch", show=True, mininterval=0):
        pass
    shown = capsys.readouterr().err
    assert "\r" in shown
    assert "\n" not in shown
    assert "evaluate" in shown
