"""Text that a model writes after a prompt, as token ids."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from eigenslice.data.tokens import longest_sequence
from eigenslice.errors import ActivationError, CheckpointError, OptionsError


class RefuseNaN(LogitsProcessor):
    """A logits processor that changes nothing and refuses NaN, of which any token could be chosen."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, vocabulary) of the next tokens after input_ids (B, T).

        Raises:
            ActivationError: one is NaN.
        """
        if scores.isnan().any():
            raise ActivationError(
                f"the prediction of token {input_ids.shape[1]} is NaN",
                allowed="predictions that are numbers",
                next_step="check the model's weights, or run with --dtype float32",
            )
        return scores


@dataclass(frozen=True)
class Writer:
    """A loaded model that goes on from prompts.

    Attributes:
        name: The name that the user wrote.
        model: The model.
        tokenizer: Its tokenizer.
        new: Tokens to write after each prompt, or fewer where the model ends its text.
        shorter: Advice to a user whose prompt is too long.
    """

    name: str
    model: Any
    tokenizer: Any
    new: int
    shorter: str

    def prompt_ids(self, prompt: str, most: int | None = None) -> Tensor:
        """Token ids of a prompt, (1, T), from its start; `most` is the largest T.

        Raises:
            CheckpointError: the tokenizer makes nothing of it, or tokens that the model doesn't have.
            OptionsError: the model takes fewer tokens than the prompt and the new tokens.
        """
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][:, :most]
        config = self.model.config.get_text_config()
        longest = longest_sequence(config)
        if longest and ids.shape[1] + self.new > longest:
            raise OptionsError(
                f"--new {self.new} after a prompt of {ids.shape[1]} tokens: {self.name} takes {longest}",
                allowed=f"at most {longest} tokens together",
                next_step=f"lower --new, or {self.shorter}",
            )
        largest = int(ids.max()) if ids.numel() else None
        if largest is None or largest >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.name} makes {'nothing' if largest is None else f'token {largest}'} "
                f"of {prompt!r}",
                allowed=f"at least one token, of ids from 0 to {config.vocab_size - 1}",
                next_step="pass another prompt, or check the tokenizer's files",
            )
        return ids.long().to(self.model.device)

    def go_on(self, ids: Tensor, choose: LogitsProcessor | None = None, repetition_penalty: float = 1.0) -> Tensor:
        """Token ids (n,) of the most likely continuation, at most `new`, with the token that ends the text.

        Args:
            ids: Token ids of the prompt, (1, T).
            choose: Processor that makes another token the most likely one, such as a drawn one.
            repetition_penalty: Divisor of the logits of tokens that are in the text.
        """
        self.model.generation_config = config = self._config(repetition_penalty)
        processors = LogitsProcessorList([RefuseNaN(), *([choose] if choose else [])])
        with torch.no_grad():
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=processors,
            )
        return whole[0, ids.shape[1] :]

    def _config(self, repetition_penalty: float) -> GenerationConfig:
        """A config of our own: a checkpoint's may ask for anything. Only where a text ends is taken from it."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        ends = sorted({end for end in ends if type(end) is int and 0 <= end < vocabulary})
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return GenerationConfig(
            max_new_tokens=self.new,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            pad_token_id=padding,
            eos_token_id=ends or None,
        )
