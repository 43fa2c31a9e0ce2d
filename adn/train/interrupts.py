"""Ctrl-C in training: held back until a step is complete, and left to the main process by those that read images."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Ctrl-C and SIGTERM inside the block: KeyboardInterrupt, but while `hold` is set only noted, the first time.

    Also noted if raised where Python drops exceptions (a loader that is being deleted), hence `check`.
    """

    def __init__(self) -> None:
        self.hold = self._asked = False
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers, and get no signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        if again or not self.hold:
            raise KeyboardInterrupt


def ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides when workers end.

    A tensor that the main process does not fetch any more then leaves a worker's thread with a lost connection: not
    worth a traceback under the message that says how to go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _show_but_lost_connections


def _show_but_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
