"""Opening what the user names: a folder, a hub id or a GGUF file."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from gguf import GGUFReader
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from eigenslice.arch import lookup, table_of
from eigenslice.checkpoint.gguf import GgufWeights
from eigenslice.checkpoint.towers import TOWERS, holds_tower, tower_config
from eigenslice.checkpoint.weights import SafetensorsWeights, Weights, file_hashes
from eigenslice.errors import CheckpointError, EigensliceWarning, UnsupportedModelError, first_line

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """A dense checkpoint, opened for reading.

    Attributes:
        name: As the user wrote it.
        folder: Where its files are.
        gguf: Name of the GGUF file in `folder`, if that is what it is.
        config: transformers' config; of a model that reads images beside text, its language model's.
        whole: The config of such a model; None for all others.
        trust_remote_code: Whether the tokenizer may run code from the checkpoint.
    """

    name: str
    folder: Path
    gguf: str | None
    config: Any
    whole: Any
    trust_remote_code: bool

    @cached_property
    def weights(self) -> Weights:
        """The tensors, read one at a time; those of a GGUF are dequantized."""
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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{path} is not a JSON object",
                allowed="a tokenizer_config.json as transformers saves it",
                next_step="download the tokenizer again",
            )
        return config

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's own files, where the checkpoint has them."""
        if self.gguf:
            return []
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's generation config, None if it has none."""
        if self.gguf:
            return GenerationConfig.from_model_config(self.config)
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the config and of each weight file, by file name."""
        return file_hashes([*self.weights.files, *([] if self.gguf else [self.folder / "config.json"])])

    def start_hashing(self) -> Callable[[], None]:
        """Begin to compute `hashes` beside other work.

        Returns:
            Waits for the end. Who meets an error before then needn't: nothing else does.
        """

        def compute() -> None:
            with suppress(OSError):  # met again by who asks for `hashes`
                _ = self.hashes

        thread = Thread(target=compute, daemon=True)
        thread.start()
        return thread.join


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen; the one for GGUF files has no other switch."""
    transformers_logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):
        yield


def refuse_missing(name: str, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them with random numbers.

    Args:
        name: The checkpoint, as the user wrote it.
        loading: What `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        CheckpointError: weights are missing or of another shape.
    """
    missing = sorted(map(str, [*loading["missing_keys"], *loading.get("mismatched_keys", [])]))
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors or has them in another shape ({', '.join(missing[:3])})",
            allowed="a complete checkpoint",
            next_step="download or save it again",
        )


def load_tokenizer(name: str, folder: Path, gguf: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint that `locate` found.

    Raises:
        CheckpointError: there is none, or it can't be loaded.
    """
    kwargs = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:  # transformers raises whatever the tokenizer's parts raise
        raise CheckpointError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)})",
            allowed="a checkpoint with its tokenizer files, unless the data are token ids (a .safetensors file)",
            next_step="copy the tokenizer files into the folder, or pass token ids",
        ) from error


def locate(name: str) -> tuple[Path, str | None]:
    """Return the folder and, for a GGUF, the file's name in it."""
    path = Path(name).expanduser()
    try:
        if path.is_file() and path.suffix == ".gguf":
            return path.parent, path.name
        if path.is_dir():
            return path, None
        exists = path.exists()
    except OSError:  # no file can have this name, such as one of 300 characters
        exists = False
    allowed = "a local folder with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
    if exists:
        raise CheckpointError(
            f"{name} is neither a folder nor a .gguf file", allowed=allowed, next_step="pass one of these"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES)), None
    except HFValidationError as error:
        raise CheckpointError(
            f"{name} doesn't exist and is no hub id", allowed=allowed, next_step="check the path"
        ) from error
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise CheckpointError(
            f"{name} doesn't exist here and the hub didn't give it ({first_line(error)})",
            allowed=allowed,
            next_step="check the spelling, the network, and for a gated model `hf auth login`",
        ) from error


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json",
            allowed="a folder as transformers saves it",
            next_step="pass the folder that holds config.json and the weights",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} can't be read ({first_line(error)})",
            allowed='JSON with a "model_type"',
            next_step="download or save the checkpoint again",
        ) from error
    return config


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise CheckpointError(
            f"{folder} holds weights quantized by {method!r}, which can't be rotated",
            allowed="float32, float16 or bfloat16 weights, or a GGUF file (it is dequantized)",
            next_step="slice the unquantized checkpoint and quantize the result",
        )


def _refuse_lost_rope_scaling(path: Path, config: Any) -> None:
    """Refuse a GGUF whose rotary scaling (Llama 3.1 and later) transformers drops when it reads one."""
    reader = GGUFReader(path)
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    fields = [name for name in reader.fields if ".rope.scaling." in name]
    rope = getattr(config, "rope_parameters", None) or {}
    if (factors or fields) and rope.get("rope_type", "default") == "default":
        raise UnsupportedModelError(
            f"{path} scales its rotary angles ({', '.join([*factors, *fields][:3])}), which transformers loses when "
            "it reads a GGUF",
            allowed="GGUF files with plain rotary angles",
            next_step="slice the model's safetensors checkpoint",
        )


def _load_config(folder: Path, gguf: str | None) -> tuple[Any, Any]:
    """The config of what can be sliced, and that of the whole model where it is a part of one."""
    if gguf is None:
        raw = _raw_config(folder)
        if raw["model_type"] == "eigenslice":
            raise UnsupportedModelError(
                f"{folder} is a sliced model already",
                allowed="dense checkpoints",
                next_step="slice the dense model with the widths you want",
            )
        if not holds_tower(raw):
            table_of(raw["model_type"])
        _refuse_quantized(folder, raw)
    kwargs = {"gguf_file": gguf} if gguf else {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs)
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
        _refuse_lost_rope_scaling(folder / gguf, config)
    return config, whole


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
    lookup(config)
    if whole is not None:
        warnings.warn(
            f"{name} is a {whole.model_type!r} model: its language model ({config.model_type!r}) is taken alone, and "
            "the result reads no images",
            EigensliceWarning,
            stacklevel=2,
        )
    return Source(name, folder, gguf, config, whole, trust_remote_code)
