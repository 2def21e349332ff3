"""Ctrl-C at moments when nothing could catch it: while the command line is imported, and when it is done.

This is the first module that the package imports, and it imports nothing that takes time.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended, as shells count it."""


def _is_command_line() -> bool:
    """True if this process is `eigenslice ...` or `python -m eigenslice ...`, not a program that imports eigenslice."""
    if sys.argv[:1] == ["-m"]:  # the package is being imported, so that it can be run
        words = sys.orig_argv
        return "-meigenslice" in words or ("-m", "eigenslice") in pairwise(words)
    return bool(sys.argv) and Path(sys.argv[0]).stem == "eigenslice"


COMMAND_LINE = _is_command_line()


def leave_at_once(*_: Any) -> None:
    """End the process without a traceback, and without waiting for anything."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def let_it_end_at_once() -> None:
    """From now on, Ctrl-C ends the process of the command line at once."""
    if not COMMAND_LINE or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a parent may have switched it off
        signal.signal(signal.SIGINT, leave_at_once)


def let_it_be_caught() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on, so that unfinished work is tidied up."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the moments between."""
    if issubclass(kind, KeyboardInterrupt):
        leave_at_once()
    sys.__excepthook__(kind, error, trace)


let_it_end_at_once()
if COMMAND_LINE:
    sys.excepthook = _uncaught
