"""Whatever is raised ends in one message and an exit code."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jinja2 import TemplateSyntaxError
from pydantic import ValidationError
from safetensors import SafetensorError

from eigenslice import cli
from eigenslice.cli.boundary import run
from eigenslice.errors import EchoedError, EigensliceWarning, OptionsError, RankError
from eigenslice.options.slicing import SliceOptions
from tests.cli.conftest import Command

Raiser = Callable[[BaseException], Any]


@pytest.fixture
def ends(command: Command, monkeypatch: pytest.MonkeyPatch) -> Raiser:
    """Runs a verb that raises an exception."""

    def run(error: BaseException) -> Any:
        def verb() -> None:
            raise error

        monkeypatch.setattr(cli.app, "registered_commands", [])
        cli.app.command("fail")(verb)
        return command("fail")

    return run


def invalid_options() -> BaseException:
    with pytest.raises(ValidationError) as caught:
        SliceOptions.model_validate({"model": "m", "output": "o", "keep": 0.5, "shard_gib": "much"})
    return caught.value


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


EXPECTED: list[tuple[BaseException, str]] = [
    (OptionsError("--x 3", allowed="2", next_step="lower it"), "--x 3"),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), "no space is left"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "closed to this user"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "closed to this user"),
    (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "can't be opened"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "can't be opened"),
    (OSError("anything"), "the system refused something (OSError: anything)"),
    (MemoryError(), "memory ran out (MemoryError)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: x"), "memory ran out"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
    (invalid_options(), "--shard-size"),
    (PanicException("called `Option::unwrap()` on a `None` value"), "the tokenizer's library gave up"),
    (LocalEntryNotFoundError("not in the cache"), "the hub or the network failed"),
    (OfflineModeIsEnabled("offline"), "the hub or the network failed"),
    (requests.ConnectionError("no route"), "the hub or the network failed"),
    (TimeoutError("slow"), "the hub or the network failed"),
    (HFValidationError("Repo id must be x"), "impossible value"),
    (SafetensorError("Error while deserializing header"), "a weight file can't be read"),
    (yaml.YAMLError("odd"), "can't be read"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't be read"),
    (TemplateSyntaxError("unexpected '}'", 1), "a template failed"),
    (ModuleNotFoundError("No module named 'onnx'"), "a package can't be imported (ModuleNotFoundError"),
]


@pytest.mark.parametrize(("error", "found"), EXPECTED, ids=lambda value: type(value).__name__)
def test_what_others_raise_is_translated(error: BaseException, found: str, ends: Raiser) -> None:
    outcome = ends(error)
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "allowed", "next"]
    assert found in lines[0]
    assert "bug in eigenslice" not in outcome.err


def test_the_truly_unexpected_leaves_its_traceback_in_a_file(
    ends: Raiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = ends(ZeroDivisionError("division by zero\nand more"))
    assert outcome.code == 2
    error, allowed, following = outcome.err.splitlines()
    assert "(ZeroDivisionError: division by zero)" in error
    assert "bug in eigenslice" in allowed
    (file,) = tmp_path.iterdir()
    assert str(file) in following
    text = file.read_text()
    assert all(part in text for part in ("command: ['eigenslice', 'fail']", "torch ", "Traceback", "raise error"))


def test_without_a_place_for_the_file_the_message_says_where_it_was_raised(
    ends: Raiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    outcome = ends(ZeroDivisionError("x"))
    assert f"of {__file__} (no file could be written: No space left on device)" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interruption_has_its_own_code_and_no_traceback(ends: Raiser) -> None:
    outcome = ends(KeyboardInterrupt())
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err


def test_who_reads_the_output_may_go_away(ends: Raiser) -> None:
    outcome = ends(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "")


def test_of_several_processes_one_tells_the_error(ends: Raiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    texts = {"allowed": "y", "next_step": "z"}
    assert ends(EchoedError("x", **texts)).err == ""
    assert "lost the others" in ends(RankError("rank 1 lost the others", **texts)).err


def test_only_own_warnings_are_shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def verb() -> None:
        warnings.warn("theirs", stacklevel=1)
        warnings.warn("[red]ours\x1b[2J", EigensliceWarning, stacklevel=1)

    monkeypatch.setattr(cli.app, "registered_commands", [])
    cli.app.command("warn")(verb)
    outcome = command("warn")
    assert (outcome.code, outcome.err) == (0, "warning: [red]ours\\x1b[2J\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda: print("text")) == 2
    assert "standard output can't be written" in capfd.readouterr().err


SCRIPT = "import sys; sys.argv[0] = 'eigenslice'; import eigenslice"


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Processes begin with SIGINT as a terminal's do. In the background of a script they would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("arguments", [["-m", "eigenslice"], ["-c", SCRIPT]], ids=["module", "script"])
def test_ctrl_c_while_importing(arguments: list[str]) -> None:
    """What Python says about imports tells when those of the package have begun."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-v", *arguments], stderr=writing, stdout=subprocess.DEVNULL, pass_fds=[writing], text=True
    )
    os.close(writing)
    seen = b""
    while b"eigenslice/_version" not in seen.replace(b"\\", b"/"):
        seen += os.read(reading, 65536)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    while chunk := os.read(reading, 65536):
        seen += chunk
    os.close(reading)
    assert process.wait() == 130
    assert b"Traceback" not in seen
    assert seen.endswith(b"interrupted\n")
