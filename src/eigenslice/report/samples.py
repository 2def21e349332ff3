"""Text of the dense and the sliced model after the same prompts."""

from collections.abc import Callable
from dataclasses import dataclass

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import locate
from eigenslice.evaluation.continuation import Writer

PENALTY = 1.2
"""Repetition penalty: greedy text of small models goes round in circles without it."""


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
        tokenizer = loaded.tokenizer()
        writer = Writer(name, loaded.model, tokenizer, new, "pass a shorter --prompt")
        ids = [writer.go_on(writer.prompt_ids(prompt), repetition_penalty=PENALTY) for prompt in prompts]
        written.append([tokenizer.decode(part, skip_special_tokens=True).strip() for part in ids])
    return [Sample(prompt, [texts[i] for texts in written]) for i, prompt in enumerate(prompts)]
