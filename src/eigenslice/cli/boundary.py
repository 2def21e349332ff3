"""The end of every exception: one message and an exit code."""

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

from eigenslice import _interrupt
from eigenslice.cli.console import errors, show_warning
from eigenslice.cli.translations import translated
from eigenslice.errors import EchoedError, EigensliceWarning, first_line, printable

FAILED = 2
CUT_OFF = 1
"""Exit code if the reader of the output, such as `head`, has gone away."""


def run(work: Callable[[], object]) -> int:
    """Do the command line's work, and return the exit code.

    Args:
        work: The work. It may end by SystemExit, as typer does.
    """
    _interrupt.let_it_be_caught()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        with _our_hooks():
            code = _code_of(work)
    except BaseException as error:  # Ctrl-C while the error is being told
        code = _interrupt.INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    _interrupt.let_it_end_at_once()
    return _flushed(code)


def _code_of(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            _tell(stop.code, "error:")
        return stop.code if isinstance(stop.code, int) else FAILED * (stop.code is not None)
    except KeyboardInterrupt:
        _interrupt.let_it_end_at_once()
        _tell("interrupted")
        return _interrupt.INTERRUPTED
    except BrokenPipeError:
        return CUT_OFF
    except BaseException as error:  # PanicException of tokenizers is no Exception
        _interrupt.let_it_end_at_once()
        first = os.environ.get("RANK", "0") == "0"
        if first or not isinstance(error, EchoedError):  # of torchrun's processes, one tells it
            _tell(str(translated(error)), "error:")
        return FAILED
    return 0


def _tell(text: str, label: str = "") -> None:
    with suppress(OSError, ValueError):  # nobody listens
        if label:
            errors.print(label, style="bold red", end=" ")
        errors.print(text, soft_wrap=True)


@contextmanager
def _our_hooks() -> Iterator[None]:
    """Show eigenslice's own warnings, and nothing else that prints without being asked."""
    hooks = sys.unraisablehook, threading.excepthook
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", EigensliceWarning)
        warnings.showwarning = show_warning
        sys.unraisablehook = lambda _: None  # an error while something is thrown away
        threading.excepthook = _of_thread
        try:
            yield
        finally:
            sys.unraisablehook, threading.excepthook = hooks


def _of_thread(found: Any) -> None:
    """A thread of a library has failed: whoever waits for it raises an error of its own."""
    if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
        _tell(f"a thread failed ({first_line(found.exc_value)})", "warning:")


def _flushed(code: int) -> int:
    """The exit code after everything that was printed has gone where it should."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            code = code or CUT_OFF
            _discard(stream)
        except (OSError, ValueError) as error:
            if not code:
                _tell(f"standard output can't be written ({printable(str(error))})", "error:")
            code = code or FAILED
            _discard(stream)
    return code


def _discard(stream: Any) -> None:
    """Discard the rest of a stream, so that Python doesn't try to write it again at exit."""
    with suppress(OSError, ValueError):
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, stream.fileno())
        os.close(target)
