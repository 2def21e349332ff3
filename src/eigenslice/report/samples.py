"""Text of the dense and the sliced model after the same prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import locate
from eigenslice.data.tokens import longest_sequence
from eigenslice.errors import CheckpointError, OptionsError


@dataclass(frozen=True)
class Sample:
    """A prompt, and the text of each model."""

    prompt: str
    texts: list[str]


def generate(
    models: list[str],
    prompts: tuple[str, ...],
    new: int,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Sample]:
    """Generate the most likely continuations; one model is in memory at a time.

    Args:
        models: Folders, hub ids or .gguf files.
        prompts: Plain texts; chat templates aren't used.
        new: Number of tokens to write.
        device: torch device; None is a GPU if there is one.
        trust_remote_code: Let the checkpoints run code.
        progress: Called as the work goes on.

    Raises:
        CheckpointError: a model or its tokenizer can't be loaded, or don't fit together.
        OptionsError: a model takes fewer tokens.
    """
    written: list[list[str]] = []
    for name in models:
        locate(name, adapters=True)  # the second one is refused before the first one is run
    for number, name in enumerate(models):
        progress("generating", number * len(prompts), len(models) * len(prompts))
        loaded = load_model(name, device, None, trust_remote_code)
        model, tokenizer = loaded.model, loaded.tokenizer()
        model.generation_config = _greedy(model, tokenizer, new)
        written.append([_continue(name, model, tokenizer, prompt, new) for prompt in prompts])
    return [Sample(prompt, [texts[i] for texts in written]) for i, prompt in enumerate(prompts)]


def _greedy(model: Any, tokenizer: Any, new: int) -> GenerationConfig:
    """A generation config of our own: a checkpoint's may ask for anything. Only where a text ends is taken from it."""
    vocabulary = model.config.get_text_config().vocab_size
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    ends = sorted({end for end in ends if type(end) is int and 0 <= end < vocabulary})
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        repetition_penalty=1.2,  # greedy text of small models goes round in circles without it
        pad_token_id=padding,
        eos_token_id=ends or None,
    )


def _continue(name: str, model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """Return a model's text after a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids, config = inputs["input_ids"], model.config.get_text_config()
    longest = longest_sequence(config)
    if longest and ids.shape[1] + new > longest:
        raise OptionsError(
            f"--new {new} after a prompt of {ids.shape[1]} tokens: {name} takes {longest}",
            allowed=f"at most {longest} tokens together",
            next_step="lower --new, or pass a shorter --prompt",
        )
    largest = int(ids.max()) if ids.numel() else None
    if largest is None or largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {name} makes {'nothing' if largest is None else f'token {largest}'} of {prompt!r}",
            allowed=f"at least one token, of ids from 0 to {config.vocab_size - 1}",
            next_step="pass another --prompt, or check the tokenizer's files",
        )
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=inputs["attention_mask"])
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
