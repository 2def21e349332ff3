"""Perplexity: exp of the mean negative log-likelihood per predicted token.

Each window of T tokens predicts its tokens 2 to T from those before them in the window. The mean is over all
predicted tokens of all windows, so that a short last window counts by its tokens; end-of-text tokens count,
padding doesn't.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GgufConfig

from eigenslice.checkpoint.adapters import ADAPTER_CONFIG
from eigenslice.checkpoint.gguf import apart, check_gguf_fits, refuse_lost_rope_scaling
from eigenslice.checkpoint.sizes import check_total
from eigenslice.checkpoint.source import load_tokenizer, locate, no_bars, refuse_missing
from eigenslice.checkpoint.towers import TOWERS
from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.data import evaluation_tokens
from eigenslice.device import resolve_device
from eigenslice.errors import ActivationError, CalibrationError, CheckpointError, EigensliceError, first_line
from eigenslice.options import CalibrationOptions, DtypeName
from eigenslice.skeleton import empty_model
from eigenslice.stream import Batch

NO_ADAPTER = "no-adapter"
"""Where transformers looks for an adapter, which is applied afterwards: a folder that doesn't exist."""
LARGEST_LOSS = 700.0  # exp() of more is no float


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp(loss).
        loss: Mean negative log-likelihood in nats per predicted token.
        tokens: Number of predicted tokens.
        data: The description of the text.
    """

    perplexity: float
    loss: float
    tokens: int
    data: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoadedModel:
    """A model to run, dense or sliced, and a function that gives its tokenizer."""

    model: Any
    tokenizer: Callable[[], Any]


def load_model(
    name: str,
    device: str | None = None,
    dtype: DtypeName | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model as its user would, by transformers.

    Args:
        name: A folder, a hub id or a .gguf file.
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        trust_remote_code: Let the checkpoint run code.

    Raises:
        CheckpointError: transformers can't load it.
    """
    target = resolve_device(device)
    folder, gguf = locate(name, adapters=True)
    wanted = dtype or ("float32" if target.type == "cpu" else "auto")
    try:
        with apart(folder, gguf) as (place, extra), no_bars():
            model = _read(name, (folder, gguf), place, wanted, trust_remote_code, extra).to(target).eval()
            with torch.no_grad():  # some configs can be built, and not run
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=target), use_cache=False)
    except EigensliceError:
        raise
    except Exception as error:  # whatever configs, safetensors and models raise
        raise CheckpointError(
            f"transformers can't load {name} ({first_line(error)})",
            allowed="a checkpoint in safetensors, or a .gguf file, that AutoModelForCausalLM loads and runs",
            next_step="check the folder; a model with its own code needs --trust-remote-code",
        ) from error
    return LoadedModel(model, partial(load_tokenizer, name, folder, gguf, trust_remote_code))


def _read(
    name: str,
    found: tuple[Path, str | None],
    place: Path,
    dtype: DtypeName | torch.dtype | str,
    trust_remote_code: bool,
    extra: dict[str, Any],
) -> Any:
    """The model by transformers' `from_pretrained`, if it is what the files hold.

    Args:
        name: As the user wrote it.
        found: What `locate` gives.
        place: The folder for transformers.
        dtype: As transformers takes it.
        trust_remote_code: Let the checkpoint run code.
        extra: Further arguments for transformers.

    Raises:
        CheckpointError: weights are missing, unknown or of other sizes than the config says.
    """
    folder, gguf = found
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **extra)
    config.return_dict = True  # it says what users' code gets, not what the model computes
    auto = AutoModelForImageTextToText if config.model_type in TOWERS else AutoModelForCausalLM
    quantized = getattr(config, "quantization_config", None) is not None and not gguf
    if gguf:
        refuse_lost_rope_scaling(folder / gguf, config)
        check_gguf_fits(folder / gguf, config)
        # Where the package `kernels` is, transformers would leave the weights quantized, and so slow to multiply by
        extra = extra | {"quantization_config": GgufConfig(dequantize=True)}
    elif not quantized:
        empty = empty_model(config, auto, trust_remote_code=trust_remote_code)
        weights = SafetensorsWeights(folder)
        stored = sum(math.prod(weights.shape(tensor)) for tensor in weights.names())
        check_total(name, sum(p.numel() for p in empty.parameters()), stored)
    loaded: Any = auto.from_pretrained(
        place,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        adapter_kwargs={"subfolder": NO_ADAPTER},
        **extra,
    )
    model, loading = loaded
    refuse_missing(name, loading, known=not getattr(model, "is_quantized", False))
    if not gguf and (folder / ADAPTER_CONFIG).exists():
        _apply_adapter(name, folder, model)
    return model


def _apply_adapter(name: str, folder: Path, model: Any) -> None:
    """Apply the adapter beside a model's weights, as `from_pretrained` does.

    That forgets, where there is an adapter, which of the model's own weights were missing.

    Raises:
        CheckpointError: the adapter isn't one of this model.
    """
    before = {parameter.data_ptr() for parameter in model.parameters()}
    found = model.load_adapter(str(folder))
    refuse_missing(name, found.to_dict())
    for parameter in model.parameters():
        if parameter.data_ptr() not in before:
            parameter.data = parameter.data.to(model.dtype)


def negative_log_likelihood(model: Any, batch: Batch) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of tokens predicted.

    One sequence at a time, so that the logits of a large vocabulary fit.
    """
    total, tokens = 0.0, 0
    for row in range(batch.input_ids.shape[0]):
        logits, targets = predictions(model, batch, row)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total, tokens


def predictions(model: Any, batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, V) of one sequence for its P predicted tokens, in the model's dtype, and these tokens (P,).

    Token t is predicted where it and the one before it aren't padding.
    """
    ids = batch.input_ids[row : row + 1].to(model.device)
    mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1].to(model.device)
    kwargs = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits[0, :-1]
    if mask is None:
        return logits, ids[0, 1:]
    counts = (mask[0, 1:] * mask[0, :-1]).bool()
    return logits[counts], ids[0, 1:][counts]


def perplexity(
    model: Any,
    batches: list[Batch],
    data: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Perplexity:
    """Measure a model on windows of tokens.

    Raises:
        ActivationError: the loss is NaN or too large.
        CalibrationError: there is no token to predict.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress("evaluating", number, len(batches))
            loss, count = negative_log_likelihood(model, batch)
            total, tokens = total + loss, tokens + count
    if not tokens:
        raise CalibrationError(
            "no token can be predicted: the mask leaves no two neighbours",
            allowed="sequences with at least 2 tokens that are not padding",
            next_step="check the attention_mask beside the token ids",
        )
    loss = total / tokens
    if not loss < LARGEST_LOSS:
        raise ActivationError(
            f"the loss is {loss}",
            allowed=f"a loss below {LARGEST_LOSS} nats per token, so that its exponential is a number",
            next_step="check the model's weights, or run with --dtype float32",
        )
    return Perplexity(math.exp(loss), loss, tokens, data or {})


def evaluate(
    name: str,
    data: CalibrationOptions,
    device: str | None = None,
    dtype: DtypeName | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Perplexity:
    """Perplexity of a folder, a hub id or a .gguf file; arguments as `load_model`'s and `perplexity`'s."""
    return evaluate_each(name, [data], device, dtype, trust_remote_code, progress)[0]


def evaluate_each(
    name: str,
    texts: Iterable[CalibrationOptions],
    device: str | None = None,
    dtype: DtypeName | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Perplexity]:
    """A perplexity for each text, in their order; the model is loaded once. Arguments as `evaluate`'s."""
    loaded = load_model(name, device, dtype, trust_remote_code)
    config = loaded.model.config.get_text_config()
    tokens = [evaluation_tokens(text, loaded.tokenizer, config) for text in texts]
    return [perplexity(loaded.model, t.batches, t.description, progress) for t in tokens]
