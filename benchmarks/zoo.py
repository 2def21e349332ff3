"""Tiny models of a dozen families, trained for minutes on TinyStories: benchmarks/families.py slices them.

    python benchmarks/zoo.py --text tinystories.json --tokenizer LLAMA_1MB [--cache FOLDER] [--threads 1] [KIND ...]

The text is a JSON list of stories, the tokenizer a folder with the tokenizer of the 1 MB Llama (512 tokens). A model
has 1.1 to 1.8 M parameters in its blocks and 0.07 to 0.13 M in embedding and head. So a share of the stored
parameters is nearly a share of the blocks' parameters. Each model is an ordinary checkpoint in CACHE/KIND. Its record
zoo.json has the loss on stories that no model has seen. A folder is written whole or not at all; a kind that is there
is left as it is. Delete its folder to train it anew.

A model passes 1.2 M tokens, about three times through the 0.41 M of the training stories. That is short: real models
see tens to thousands of tokens a parameter. Their weights hold more, so a cut may cost them more than these models.
llama takes 3.5 minutes of one core (AMD EPYC with AVX512-BF16), and reaches a held-out perplexity of 7.67; the 1 MB
Llama itself has 4.58 there.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eigenslice.errors import OptionsError
from naive import block_parameters, stored
from zoo_kinds import KINDS

RECORD, TEXT = "zoo.json", "text.safetensors"
LENGTH = 256
"""Tokens of a window."""
HELD_OUT = 10
"""One story in so many is held out, the last ones of the file."""
BATCH, TOKENS, WARMUP = 4, 1_200_000, 50
"""Windows a step, tokens of a training, steps until the full rate.

After 150 000 tokens a llama's held-out loss is 3.24 nats with batches of 4, and 3.81 with batches of 8.
"""
RATE, DECAY, LAST_RATE = 3e-3, 0.1, 0.05
"""AdamW's rate and its decay of matrices; the rate at the end, as a share of the full one."""
BALANCE = 5e-3
"""What an expert's correction bias gains or loses in a step; DeepSeek's 1e-3 is for a thousand times as many steps."""
CURVE, CURVE_WINDOWS = 6, 4
"""How often the held-out loss is taken in a training, on one held-out window in so many."""


def text_windows(text: Path, tokenizer: Path, cache: Path) -> dict[str, Tensor]:
    """Windows (N, LENGTH) of training and of held-out stories, each story behind a token that begins it.

    Raises:
        OptionsError: the text isn't a list of stories, or the cache is another text's.
    """
    path, source = cache / TEXT, cache / "text.json"
    identity = {"text": _hash(text), "tokenizer": _hash(tokenizer / "tokenizer.json"), "length": LENGTH}
    if path.exists():
        if json.loads(source.read_text(encoding="utf-8")) != identity:
            raise OptionsError(
                f"{cache} holds another text", allowed="a cache a text", next_step="name another --cache"
            )
        return load_file(path)
    stories = json.loads(text.read_text(encoding="utf-8"))
    if not isinstance(stories, list) or len(stories) < HELD_OUT or not all(isinstance(story, str) for story in stories):
        raise OptionsError(
            f"{text} is no list of stories", allowed='JSON such as ["Once …", …]', next_step="name another"
        )
    encode = AutoTokenizer.from_pretrained(tokenizer)
    ids = [[encode.bos_token_id, *encode(story, add_special_tokens=False).input_ids] for story in stories]
    first = len(ids) - len(ids) // HELD_OUT
    windows = {name: cut_windows(part, LENGTH) for name, part in (("train", ids[:first]), ("heldout", ids[first:]))}
    cache.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(identity), encoding="utf-8")
    partial = path.with_suffix(f".{os.getpid()}")
    save_file(windows, partial)
    partial.replace(path)
    return windows


def cut_windows(documents: list[list[int]], length: int) -> Tensor:
    """Documents one behind the other in windows of int64 (N, length); what is left over at the end is dropped."""
    stream = torch.tensor([token for document in documents for token in document])
    return stream[: len(stream) // length * length].view(-1, length)


def batches(windows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, length) in random order; in each epoch the windows begin at another offset."""
    generator = torch.Generator().manual_seed(seed)
    stream, length = windows.flatten(), windows.shape[1]
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - offset) // length
        epoch = stream[offset : offset + count * length].view(count, length)
        order = torch.randperm(count, generator=generator)
        yield from (epoch[rows] for rows in order.split(size) if len(rows) == size)


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: linear warmup, then a cosine down to LAST_RATE."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def routers(model: Any) -> list[Any]:
    """The modules that choose experts; their third output has the experts' numbers (tokens, k)."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


class Loads:
    """Counts of the tokens that each router sends to each expert, while it is attached to a model."""

    def __init__(self, model: Any, hooks: ExitStack) -> None:
        self.routers = routers(model)
        self.counts = [torch.zeros(router.weight.shape[0]) for router in self.routers]
        for router, count in zip(self.routers, self.counts, strict=True):
            hooks.callback(router.register_forward_hook(self._adder(count)).remove)

    @staticmethod
    def _adder(count: Tensor) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> None:
            count.add_(torch.bincount(output[2].flatten(), minlength=len(count)))

        return add

    def balance(self) -> None:
        """DeepSeek V3's way without a loss: experts with few tokens get a higher bias, others a lower one."""
        for router, count in zip(self.routers, self.counts, strict=True):
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias += BALANCE * (count.mean() - count).sign()
            count.zero_()

    @property
    def shares(self) -> list[list[float]]:
        """Share of the routed tokens of each expert of each router."""
        return [[round(float(share), 4) for share in count / count.sum()] for count in self.counts]


def held_out_loss(model: Any, windows: Tensor) -> float:
    """Nats per predicted token, in float32."""
    model.eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(rows).logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            )
            for rows in windows.split(BATCH)
        ]
    model.train()
    return float(sum(losses)) / windows[:, 1:].numel()


def build(kind: str, tokenizer: Path, seed: int) -> Any:
    """An untrained model of a kind, with transformers' own initial weights."""
    from_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"vocab_size": len(from_tokenizer), "bos_token_id": from_tokenizer.bos_token_id}
    config = {**KINDS[kind], **ids, "eos_token_id": from_tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def train(model: Any, windows: dict[str, Tensor], tokens: int, seed: int) -> dict[str, Any]:
    """Train in place by AdamW under bfloat16 autocast; a mixture's loss that balances experts joins the model's loss.

    Returns:
        Seconds, and the held-out loss as the training went on: [tokens, nats].
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    steps, start, curve = max(CURVE, tokens // (BATCH * LENGTH)), time.perf_counter(), []
    extra = {"output_router_logits": True} if getattr(model.config, "router_aux_loss_coef", 0) else {}
    model.train()
    with ExitStack() as hooks:
        loads = Loads(model, hooks)
        for step, rows in zip(range(steps), batches(windows["train"], BATCH, seed), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate(step, steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(rows, labels=rows, use_cache=False, **extra).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loads.balance()
            if (step + 1) % (steps // CURVE) == 0:
                passed = (step + 1) * BATCH * LENGTH
                curve.append([passed, round(held_out_loss(model, windows["heldout"][::CURVE_WINDOWS]), 4)])
                print(f"{passed} tokens, {time.perf_counter() - start:.0f} s: {curve[-1][1]}", flush=True)
    return {"seconds": round(time.perf_counter() - start, 1), "steps": steps, "curve": curve}


def make(kind: str, arguments: argparse.Namespace, windows: dict[str, Tensor]) -> None:
    """Train a kind and write its folder; what an interrupted run has left is removed."""
    folder = arguments.cache / kind
    model = build(kind, arguments.tokenizer, arguments.seed)
    about = {"kind": kind, "config": KINDS[kind], "seed": arguments.seed, "tokens": arguments.tokens}
    about |= {"parameters": stored(model), "block_parameters": block_parameters(model)}
    about |= {"threads": torch.get_num_threads()}
    print(f"{kind}: {about['parameters']} parameters", flush=True)
    about |= train(model, windows, arguments.tokens, arguments.seed)
    with ExitStack() as hooks:
        loads = Loads(model, hooks)
        loss = held_out_loss(model, windows["heldout"])
        about |= {"held_out_loss": loss, "held_out_perplexity": math.exp(loss)}
        if loads.routers:
            about["expert_shares"] = loads.shares
    partial = folder.with_name(f"{kind}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)
    print(f"{kind}: {about['seconds']} s, held-out perplexity {about['held_out_perplexity']:.3f}", flush=True)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS) + " [all]")
    add("--text", type=Path, required=True, help="JSON list of stories")
    add("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    add("--cache", type=Path, default=Path.home() / ".cache/eigenslice/zoo", help="folder of the models")
    add("--tokens", type=int, default=TOKENS, help="tokens of a training")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    parsed.kinds = parsed.kinds or list(KINDS)
    unknown = set(parsed.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    windows = text_windows(parsed.text, parsed.tokenizer, parsed.cache)
    for kind in parsed.kinds:
        if (parsed.cache / kind / RECORD).exists():
            print(f"{kind}: is there", flush=True)
        else:
            make(kind, parsed, windows)


if __name__ == "__main__":
    main()
