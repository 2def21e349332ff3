"""Messages for errors of other libraries and of the system, and the message for unknown errors."""

import errno
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import torch.distributed as dist
import yaml
from filelock import Timeout
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from jinja2 import TemplateError
from pydantic import ValidationError
from safetensors import SafetensorError

from eigenslice.errors import EigensliceError, OptionsError, first_line
from eigenslice.options.flags import flag_at
from eigenslice.runtime.out_of_memory import is_out_of_memory

SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
MANY = (errno.EMFILE, errno.ENFILE)
NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST)
NETWORK = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "hf_xet", "huggingface_hub")
FORMATS = ("json", "gzip", "zlib", "lzma", "zipfile", "_csv")
"""Packages by the modules of their errors."""


def _number(error: BaseException, numbers: tuple[int, ...]) -> bool:
    return isinstance(error, OSError) and error.errno in numbers


def _from(error: BaseException, *packages: str) -> bool:
    """Return whether an error's class, or one of its bases, is of one of these packages."""
    return any(kind.__module__.partition(".")[0] in packages for kind in type(error).__mro__)


@dataclass(frozen=True)
class Translation:
    """The message to the user for an error of another library or of the system."""

    applies: Callable[[BaseException], bool]
    found: str
    allowed: str
    next_step: str


def _kind(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


TRANSLATIONS = (
    Translation(
        is_out_of_memory,
        "memory ran out",
        "work that fits into this machine's memory",
        "lower --seqlen, --batch or --prompt, or use a larger machine",
    ),
    Translation(
        lambda e: _number(e, SPACE),
        "no space is left",
        "a disk with enough free space and quota",
        "free space or choose another --output, then run the command again (with --resume, if it has that)",
    ),
    Translation(
        lambda e: _number(e, RIGHTS),
        "a file or folder is closed to this user",
        "input that may be read, and output below a folder that may be written",
        "change the permissions, or choose another path",
    ),
    Translation(
        lambda e: _number(e, MANY),
        "too many files are open",
        "as many open files as the system allows (ulimit -n)",
        "raise the limit, such as by ulimit -n 4096",
    ),
    Translation(
        _kind(Timeout),
        "another process holds a lock",
        "one process for each output and each download",
        "wait for it, or end it",
    ),
    Translation(
        _kind(dist.DistError),
        "the processes can't reach each other",
        "processes that torchrun has started, all of them running",
        "check the addresses and the network between the machines",
    ),
    Translation(
        _kind(StrictDataclassError, HFValidationError),
        "a name or a config has an impossible value",
        "values that transformers takes",
        "check the name, and config.json",
    ),
    Translation(
        lambda e: isinstance(e, ConnectionError | TimeoutError) or _from(e, *NETWORK),
        "the hub or the network failed",
        "a hub that can be reached, or files that are in the cache",
        "check the network, the name and `hf auth login`, or pass a folder",
    ),
    Translation(
        lambda e: _number(e, NAMES),
        "a file or folder can't be opened",
        "paths that exist, or that the file system takes",
        "check the paths",
    ),
    Translation(
        _kind(OSError),
        "the system refused something",
        "files and devices that work",
        "check the paths and the disk",
    ),
    Translation(
        _kind(RecursionError),
        "something is nested too deep",
        "JSON, YAML and templates with a few levels",
        "check the config, the tokenizer's files and the data",
    ),
    Translation(
        _kind(SafetensorError),
        "a weight file can't be read",
        "safetensors files as transformers or eigenslice write them",
        "copy or download the checkpoint again",
    ),
    Translation(
        lambda e: isinstance(e, UnicodeError | yaml.YAMLError | EOFError) or _from(e, *FORMATS),
        "a file or a text can't be read",
        "UTF-8 text; JSON or YAML where a file is said to be that",
        "check the files that the command names, and those in the model's folder",
    ),
    Translation(
        _kind(TemplateError),
        "a template failed",
        "a chat template that takes the records that there are",
        "check the model's chat_template, or do without it",
    ),
    Translation(
        lambda e: type(e).__name__ == "PanicException" or _from(e, "tokenizers", "pyo3_runtime"),
        "the tokenizer's library gave up",
        "tokenizer files that transformers can load and run",
        "check tokenizer.json, or download it again",
    ),
    Translation(
        lambda e: _from(e, "datasets", "pyarrow", "fsspec"),
        "a data set can't be read",
        "a data set that the package datasets reads",
        "check its name and files",
    ),
    Translation(
        _kind(ImportError),
        "a package can't be imported",
        "an environment in which eigenslice and its packages are complete",
        "install eigenslice anew, with the extra that the command needs, such as pip install 'eigenslice[eval]'",
    ),
)
"""The first one that applies is taken. Whatever isn't in here is a bug in eigenslice."""


def translated(error: BaseException) -> EigensliceError:
    """The message that an exception becomes; for the truly unexpected, the traceback is written to a file."""
    if isinstance(error, EigensliceError):
        return error
    if isinstance(error, ValidationError):
        return _of_options(error)
    for row in TRANSLATIONS:
        if row.applies(error):
            return EigensliceError(f"{row.found} ({first_line(error)})", allowed=row.allowed, next_step=row.next_step)
    return EigensliceError(
        f"eigenslice didn't expect this ({first_line(error)})",
        allowed="success, or a message that says what to do: this is a bug in eigenslice",
        next_step=f"report it to {_where()}, with {_written(error)}",
    )


def _of_options(error: ValidationError) -> OptionsError:
    """Translate errors of options with values of wrong types."""
    first = error.errors(include_url=False)[0]
    name = str(next((part for part in reversed(first["loc"]) if isinstance(part, str)), error.title))
    flag = flag_at(error.title, first["loc"]) or f"--{name.replace('_', '-')}"
    return OptionsError(
        f"{flag} {str(first.get('input'))[:100]!a}",
        allowed=first["msg"][:1].lower() + first["msg"][1:],
        next_step="correct the option, or leave it out for the default",
    )


def _where() -> str:
    """Return the address for bug reports, from the package's metadata."""
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.metadata("eigenslice").get_all("Project-URL") or []:
            label, _, address = line.partition(", ")
            if label.lower() in ("issues", "bug tracker", "repository"):
                return address
    return "the project that you have eigenslice from"


def _written(error: BaseException) -> str:
    """The file that holds the traceback; without one, the place that raised the error."""
    text = "\n".join((*_environment(), "", *traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="eigenslice-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        return f"the file {file.name}, which holds the traceback"
    except OSError as reason:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"what raised it: line {place.lineno} of {place.filename} (no file could be written: {reason.strerror})"


def _environment() -> Iterator[str]:
    """Versions and the command line."""
    yield f"command: {sys.argv!r}"
    yield f"python {sys.version} on {sys.platform}"
    for package in ("eigenslice", "torch", "transformers", "tokenizers", "huggingface-hub", "safetensors", "lm-eval"):
        with suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"
