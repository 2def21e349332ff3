"""A dense checkpoint, opened for reading: config, weights, tokenizer, hashes."""

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from eigenslice.arch import lookup, table_of
from eigenslice.checkpoint.check import read_config
from eigenslice.checkpoint.download import commit_of
from eigenslice.checkpoint.files import read_json
from eigenslice.checkpoint.gguf import GgufWeights, apart, refuse_lost_rope_scaling
from eigenslice.checkpoint.locate import locate
from eigenslice.checkpoint.names import TOKENIZER_CONFIG, code_named
from eigenslice.checkpoint.scan import Extent, refuse_unfit, scan
from eigenslice.checkpoint.towers import TOWERS, holds_tower, tower_config
from eigenslice.checkpoint.weights import LEFTOVERS, SafetensorsWeights, Weights
from eigenslice.errors import CheckpointError, EigensliceWarning, UnsupportedModelError, first_line
from eigenslice.runtime.durable import file_hashes
from eigenslice.runtime.progress import MIB, Progress

HASHING_STAGE = "hashing"
"""Stage of the run in which the checkpoint's files are read once; its steps are MiB."""
SILENT = 5.0
"""Seconds of hashing that nobody needs to be told of."""


@dataclass(frozen=True)
class Source:
    """A dense checkpoint, opened for reading.

    Attributes:
        name: The name that the user wrote.
        folder: The folder of the files.
        gguf: Name of the GGUF file in `folder`; None for a folder of safetensors.
        config: transformers' config. For a model that reads images beside text, the config of its language model.
        whole: The config of the whole model, if it reads images beside text; otherwise None.
        trust_remote_code: True if the tokenizer may run code from the checkpoint.
    """

    name: str
    folder: Path
    gguf: str | None
    config: Any
    whole: Any
    trust_remote_code: bool

    @property
    def path(self) -> Path:
        """The file or folder that holds the checkpoint."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def revision(self) -> str | None:
        """The commit of a model on the hub; None for a folder or file here."""
        return commit_of(self.folder)

    @property
    def dropped_rows(self) -> int:
        """Rows of the checkpoint's embedding that are left out: none, unless the vocabulary is cut."""
        return 0

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        """Entry of the manifest on a vocabulary that is cut; None if all tokens stay."""
        return None

    @cached_property
    def weights(self) -> Weights:
        """The tensors, read one at a time. Tensors of a GGUF are dequantized."""
        if self.gguf is None:
            return SafetensorsWeights(self.folder)
        return GgufWeights(self.folder / self.gguf, self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.name, self.folder, self.gguf, self.trust_remote_code)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """Content of tokenizer_config.json, None if there is none.

        Raises:
            CheckpointError: it isn't a JSON object.
        """
        path = self.folder / "tokenizer_config.json"
        if self.gguf or not path.is_file():
            return None
        return read_json(path, self.folder, "a tokenizer_config.json as transformers saves it")

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's generation config, None if it has none.

        Raises:
            CheckpointError: transformers can't read it.
        """
        if self.gguf:
            return GenerationConfig.from_model_config(self.config)
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return None
        read_json(path, self.folder, "a generation_config.json as transformers saves it")
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except Exception as error:  # its values are validated with several exception types
            raise CheckpointError(
                f"transformers can't read {path} ({first_line(error)})",
                allowed="a generation_config.json as transformers saves it",
                next_step="correct or remove the file",
            ) from error

    @cached_property
    def _scanned(self) -> tuple[dict[str, str], dict[str, Extent]]:
        """Hashes of the weight files, and the extent of each tensor: the files are read once for both."""
        hashes: dict[str, str] = {}
        extents: dict[str, Extent] = {}
        done = 0
        for file in self.weights.files:
            hashes[file.name], extents_of_file = scan(
                file, self.weights.spans(file), lambda count, before=done: self._scanned_bytes.append(before + count)
            )
            extents |= extents_of_file
            done += file.stat().st_size
        return hashes, extents

    @cached_property
    def _scanned_bytes(self) -> deque[int]:
        """Bytes of the weight files that were read for `hashes` so far; the last number is the latest."""
        return deque([0], maxlen=1)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the config and of each weight file, by file name."""
        return self._scanned[0] | file_hashes([] if self.gguf else [self.folder / "config.json"])

    def check_finite(self, dtype: torch.dtype | None = None) -> None:
        """Refuse weights with NaN or infinite numbers, used or not. The files are read for it once, with `hashes`.

        Args:
            dtype: The dtype of the forward pass. Numbers too large for it are refused, too.

        Raises:
            CheckpointError: a tensor has such a number; the message names the tensor and its file.
        """
        refuse_unfit(self.name, self._scanned[1], dtype)

    def start_hashing(self) -> Callable[[Progress], None]:
        """Begin to compute `hashes`, and the extents for `check_finite`, beside other work.

        Returns:
            Function that waits for the end, and reports every second how many MiB were read, if it lasts. After an
            error elsewhere, waiting isn't necessary.
        """

        def compute() -> None:
            with suppress(OSError, CheckpointError):  # met again by who asks for `hashes`
                _ = self.hashes

        self._scanned_bytes.append(0)
        thread = Thread(target=compute, daemon=True)
        thread.start()
        return partial(self._wait, thread)

    def _wait(self, thread: Thread, progress: Progress) -> None:
        thread.join(SILENT)
        total = -(-sum(file.stat().st_size for file in self.weights.files) // MIB)
        while thread.is_alive():
            progress(HASHING_STAGE, self._scanned_bytes[-1] // MIB, total)
            thread.join(1)
            if not thread.is_alive():
                progress(HASHING_STAGE, total, total)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen; the one for GGUF files has no other switch."""
    transformers_logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):
        yield


def refuse_missing(name: str, loading: dict[str, Any], known: bool = True) -> None:
    """Refuse a checkpoint that lacks weights, which transformers fills with random numbers, or has unknown ones.

    Args:
        name: The checkpoint, as the user wrote it.
        loading: The loading info of `from_pretrained(..., output_loading_info=True)`.
        known: True to refuse weights that the model doesn't have, too.

    Raises:
        CheckpointError: weights are missing, of another shape or unknown.
    """
    missing = sorted(map(str, [*loading["missing_keys"], *loading.get("mismatched_keys", [])]))
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors or has them in another shape ({', '.join(missing[:3])})",
            allowed="a complete checkpoint",
            next_step="download or save it again",
        )
    unknown = sorted(str(tensor) for tensor in loading.get("unexpected_keys", []) if not LEFTOVERS.search(str(tensor)))
    if unknown and known:
        raise CheckpointError(
            f"{name} has {len(unknown)} unknown tensors ({', '.join(unknown[:3])})",
            allowed="exactly the weights of the model that config.json describes",
            next_step="check that config.json and the weights belong together",
        )


def load_tokenizer(name: str, folder: Path, gguf: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint that `locate` found.

    Raises:
        CheckpointError: there is none, or it can't be loaded.
    """
    try:
        with apart(folder, gguf) as (place, extra):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **extra)
    except BaseException as error:  # transformers raises whatever the tokenizer's parts raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust code
            raise
        config = folder / TOKENIZER_CONFIG
        withheld = not trust_remote_code and not gguf and config.is_file() and code_named(read_json(config, folder, ""))
        raise CheckpointError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)})",
            allowed="a checkpoint with its tokenizer files, unless the data are token ids (a .safetensors file)",
            next_step="add --trust-remote-code if you trust the checkpoint's code"
            if withheld
            else "copy the tokenizer files into the folder, or pass token ids",
        ) from error


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise CheckpointError(
            f"{folder} holds weights quantized by {method!r}, which can't be rotated",
            allowed="float32, float16 or bfloat16 weights, or a GGUF file (it is dequantized)",
            next_step="slice the unquantized checkpoint and quantize the result",
        )


def _load_config(folder: Path, gguf: str | None) -> tuple[Any, Any]:
    """Return the config of the language model, and the config of the whole model if it has more parts."""
    if gguf is None:
        raw = read_config(folder)
        if raw["model_type"] == "eigenslice":
            raise UnsupportedModelError(
                f"{folder} is a sliced model already",
                allowed="dense checkpoints",
                next_step="slice the dense model with the widths you want",
            )
        if not holds_tower(raw):
            table_of(raw["model_type"])
        _refuse_quantized(folder, raw)
    try:
        with apart(folder, gguf) as (place, extra):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **extra)
    except Exception as error:  # config classes validate with several exception types
        raise CheckpointError(
            f"transformers can't read the config of {folder / (gguf or 'config.json')} ({first_line(error)})",
            allowed="a config that transformers accepts",
            next_step="check the file; a GGUF must be of an architecture that transformers can dequantize",
        ) from error
    whole = None
    if config.model_type in TOWERS:
        whole, config = config, tower_config(config)
    if not config.num_hidden_layers:
        raise CheckpointError(
            f"{folder} is a model without decoder layers",
            allowed="at least one layer",
            next_step="check num_hidden_layers in the config",
        )
    if gguf:
        refuse_lost_rope_scaling(folder / gguf, config)
    return config, whole


def _check_epsilon(name: str, config: Any) -> None:
    table = lookup(config)
    try:
        table.epsilon(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: {table.eps} is {getattr(config, str(table.eps), None)!r} in the config",
            allowed="a small number, which the norms add",
            next_step="check config.json",
        ) from error


def open_source(name: str, trust_remote_code: bool = False) -> Source:
    """Open a dense checkpoint without reading its weights.

    Args:
        name: A folder, a hub id or a `.gguf` file.
        trust_remote_code: Let the tokenizer run code from the checkpoint.

    Raises:
        CheckpointError: it doesn't exist, is broken or is quantized.
        UnsupportedModelError: its architecture, or variant of it, can't be sliced.
    """
    folder, gguf = locate(name)
    config, whole = _load_config(folder, gguf)
    _check_epsilon(name, config)
    if whole is not None:
        warnings.warn(
            f"{name} is a {whole.model_type!r} model: its language model ({config.model_type!r}) is taken alone, and "
            "the result reads no images",
            EigensliceWarning,
            stacklevel=2,
        )
    return Source(name, folder, gguf, config, whole, trust_remote_code)
