"""What the dense and the sliced model write after the same prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eigenslice.evaluate import load_model

PROMPTS = (
    "The most important thing about a good library is",
    "Once upon a time, there was a little girl who",
    "Water boils at",
)


@dataclass(frozen=True)
class Sample:
    """A prompt, and what each model wrote."""

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
    """The most likely continuations; one model is in memory at a time.

    Args:
        models: Folders, hub ids or .gguf files.
        prompts: Plain text, whatever chat template the models have.
        new: Tokens to write.
        device: torch device; None is a GPU if there is one.
        trust_remote_code: Let the checkpoints run code.
        progress: Called as the work goes on.

    Raises:
        CheckpointError: a model or its tokenizer can't be loaded.
    """
    written: list[list[str]] = []
    for number, name in enumerate(models):
        progress("generating", number * len(prompts), len(models) * len(prompts))
        loaded = load_model(name, device, None, trust_remote_code)
        tokenizer = loaded.tokenizer()
        texts = []
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
            with torch.no_grad():
                output = loaded.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=new,
                    do_sample=False,
                    repetition_penalty=1.2,  # greedy text of small models goes round in circles without it
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                )
            texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        written.append(texts)
    return [Sample(prompt, [texts[i] for texts in written]) for i, prompt in enumerate(prompts)]
