"""Loss of a result with fewer tokens on the same text as the dense model: bits per byte, and the ratio of perplexities.

    eigenslice slice MODEL.gguf -o small --keep 0.6 --vocabulary-from TEXT
    python benchmarks/vocabulary.py MODEL.gguf small --test wiki=wiki.test.txt --test docstrings=builtin \\
        -o benchmarks/results/NAME.json

Two tokenizers split a text into different numbers of tokens, so that perplexities per token don't compare. Here both
models read the same characters: windows of a text, each encoded by the model's own tokenizer. The loss is the negative
log-likelihood of all tokens of a window but the first one. The ratio is exp of the difference of both losses over the
number of the dense model's tokens: the factor by which the perplexity per dense token grows.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from eigenslice import __version__
from eigenslice.checkpoint.loading import load_model
from eigenslice.data.builtin import library_docstrings


def read(name: str) -> str:
    """Return a file's text; `builtin` is the docstrings of Python's standard library."""
    return "\n\n".join(library_docstrings()) if name == "builtin" else Path(name).read_text(encoding="utf-8")


def windows(text: str, count: int, characters: int) -> list[str]:
    """Return pieces of a text, evenly spread over the text."""
    step = len(text) // count
    return [text[number * step : number * step + min(step, characters)] for number in range(count)]


@torch.no_grad()
def loss(model: Any, tokenizer: Any, pieces: list[str]) -> tuple[float, int]:
    """Return the negative log-likelihood of pieces of text in nats, and the number of predicted tokens."""
    total, tokens = 0.0, 0
    for piece in pieces:
        ids = tokenizer(piece, return_tensors="pt")["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total, tokens


def measure(name: str, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Return a model's number of parameters, and its loss on each text."""
    loaded = load_model(name, "cpu", "float32")
    tokenizer = loaded.tokenizer()
    found: dict[str, Any] = {"parameters": loaded.model.num_parameters(), "tokens": len(tokenizer), "loss": {}}
    for text, pieces in texts.items():
        nats, tokens = loss(loaded.model, tokenizer, pieces)
        size = sum(len(piece.encode()) for piece in pieces)
        found["loss"][text] = {"nats": nats, "tokens": tokens, "bits_per_byte": nats / size / math.log(2)}
    return found


def main() -> None:
    """Measure both models and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("result")
    parser.add_argument("--test", action="append", required=True, metavar="NAME=FILE|builtin")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--characters", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    files = dict(test.split("=", 1) for test in arguments.test)
    texts = {name: windows(read(file), arguments.windows, arguments.characters) for name, file in files.items()}
    dense, result = measure(arguments.dense, texts), measure(arguments.result, texts)
    content: dict[str, Any] = {
        "dense": {"model": Path(arguments.dense).name} | dense,
        "result": {"model": Path(arguments.result).name} | result,
        "kept": result["parameters"] / dense["parameters"],
        "windows": arguments.windows,
        "characters": arguments.characters,
        "perplexity_ratio": {
            name: math.exp((result["loss"][name]["nats"] - before["nats"]) / before["tokens"])
            for name, before in dense["loss"].items()
        },
        "versions": {"eigenslice": __version__, "torch": torch.__version__},
    }
    print(json.dumps(content, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
