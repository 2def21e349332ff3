"""Text that a model writes by itself: calibration text of the kinds that it was trained on.

A model's own training text is rarely at hand, and other text shows only a part of what it can do. What it samples at
temperature 1 from random beginnings is a sample of what it learnt (arXiv 2410.17170 calibrates on it, too).
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from transformers import GenerationConfig, set_seed

from eigenslice.checkpoint.output import check_output, write_whole
from eigenslice.data.tokens import ordinary_tokens
from eigenslice.errors import OptionsError
from eigenslice.evaluate import load_model
from eigenslice.options import DtypeName
from eigenslice.progress import Progress, no_progress


class SampleOptions(BaseModel):
    """What to write.

    Attributes:
        model: A folder, a hub id or a .gguf file. It is loaded as a whole.
        output: A .json file, a list of strings, as `slice --calibration` takes it; must not exist.
        samples: Number of texts.
        seqlen: Tokens of each.
        batch: Texts at once.
        temperature: What logits are divided by; at 1, tokens are drawn as the model predicts them.
        seed: Of the beginnings and of the drawing.
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        trust_remote_code: Let the checkpoint run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: Path
    samples: int = 64
    seqlen: int = 1024
    batch: int = 32
    temperature: float = 1.0
    seed: int = 0
    device: str | None = None
    dtype: DtypeName | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "SampleOptions":
        for name, least in (("samples", 1), ("seqlen", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise OptionsError(
                    f"--{name} {getattr(self, name)}", allowed=f"at least {least}", next_step="leave it out"
                )
        if not 0 < self.temperature < float("inf"):
            raise OptionsError(
                f"--temperature {self.temperature}", allowed="above 0", next_step="leave it out: 1 is what the model is"
            )
        if self.output.suffix != ".json":
            raise OptionsError(
                f"--output {self.output}", allowed="a .json file", next_step=f"write to {self.output}.json"
            )
        return self


def sample_text(options: SampleOptions, progress: Progress = no_progress) -> list[str]:
    """Let a model write texts into a file.

    Each begins with what the tokenizer puts before any text and one random token. Where one ends, the model goes on
    with the next, as in its training.

    Args:
        options: What to write.
        progress: Called after each batch.

    Returns:
        The texts.

    Raises:
        OptionsError: longer than the model takes.
        CheckpointError: the model or its tokenizer can't be loaded.
        OutputError: the file exists, or can't be written.
    """
    check_output(options.output)
    loaded = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    model, tokenizer = loaded.model, loaded.tokenizer()
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    start = list(tokenizer("")["input_ids"])
    length = len(start) + options.seqlen
    if longest and length > longest:
        raise OptionsError(
            f"--seqlen {options.seqlen}",
            allowed=f"at most {longest - len(start)} tokens: {options.model} takes {longest}",
            next_step="lower it; more --samples make up for it",
        )
    first = _first_tokens(tokenizer, config.vocab_size, options)
    # A config of its own: those of checkpoints cut the tail off and stop where a text ends
    sampling = GenerationConfig(
        max_length=length,
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    model.generation_config = sampling
    set_seed(options.seed)
    texts: list[str] = []
    for begin in range(0, options.samples, options.batch):
        progress("sampling", begin, options.samples)
        beginnings = first[begin : begin + options.batch, None]
        prompt = torch.cat([torch.tensor([start] * len(beginnings), dtype=torch.long), beginnings], dim=1)
        prompt = prompt.to(model.device)
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=sampling)
        texts += tokenizer.batch_decode(ids[:, len(start) :], skip_special_tokens=True)
    progress("sampling", options.samples, options.samples)
    write_whole(options.output, json.dumps(texts, ensure_ascii=False, indent=0))
    return texts


def _first_tokens(tokenizer: Any, vocabulary: int, options: SampleOptions) -> torch.Tensor:
    """One random token for each text, (samples,); no special ones."""
    ordinary = ordinary_tokens(tokenizer, vocabulary)
    generator = torch.Generator().manual_seed(options.seed)
    return ordinary[torch.randint(len(ordinary), (options.samples,), generator=generator)]
