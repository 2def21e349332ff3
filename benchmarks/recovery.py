"""What recovery fine-tuning gives back: excess perplexity before and after, over tokens trained on.

    eigenslice slice MODEL.gguf -o sliced --keep 0.75
    python benchmarks/recovery.py MODEL.gguf sliced --train wiki.txt --train alpaca.json#instruction,output \\
        --test wiki=wiki.test.txt --test docstrings=builtin --tokens 100000,400000 --ways lora,full \\
        --work WORK -o benchmarks/results/NAME

writes NAME.json and NAME.md. The excess is a model's perplexity over the dense one's, less 1; "left" is the share of
the sliced model's excess that is there after training. Ways: lora, full (all weights), each distilled from the dense
model, and lora-next-token, full-next-token without it. Texts are SOURCE or SOURCE#FIELD, as `eigenslice slice
--calibration` takes SOURCE.

With --work, trained models stay in WORK/WAY-TOKENS and aren't made again; an interrupted training goes on.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eigenslice import CalibrationOptions, __version__
from eigenslice.checkpoint.loading import load_model
from eigenslice.data import Tokens, evaluation_tokens
from eigenslice.evaluation.perplexity import perplexity
from eigenslice.finetune import FinetuneOptions, finetune
from eigenslice.runtime.output import partial_path
from quality import text_option

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"full": False},
    "full": {"full": True},
    "lora-next-token": {"teacher": None, "full": False},
    "full-next-token": {"teacher": None, "full": True},
}


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train and measure; what is there so far is written after each model."""
    tests = dict(text_option(text, arguments.test_samples, arguments.seqlen) for text in arguments.test)
    dense = load_model(arguments.dense, arguments.device, arguments.dtype)
    config = dense.model.config.get_text_config()
    texts = {name: evaluation_tokens(test, dense.tokenizer, config) for name, test in tests.items()}
    expected = measure(dense.model, texts)
    del dense
    before = measure(load_model(str(arguments.sliced), arguments.device, arguments.dtype).model, texts)
    result: dict[str, Any] = {
        "dense": Path(arguments.dense).name,
        "kept": json.loads((arguments.sliced / "eigenslice.json").read_text())["parameters"]["kept"],
        "tests": {name: tokens.description | {"perplexity": expected[name]} for name, tokens in texts.items()},
        "before": {name: value / expected[name] for name, value in before.items()},
        "versions": {
            "eigenslice": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
        },
        "rows": [],
    }
    for tokens in arguments.tokens:
        for way in arguments.ways:
            folder = work / f"{way}-{tokens}"
            seconds = train(arguments, way, tokens, folder)
            manifest = json.loads((folder / "eigenslice.json").read_text(encoding="utf-8"))["finetune"]
            after = measure(load_model(str(folder), arguments.device, arguments.dtype).model, texts)
            ratios = {name: value / expected[name] for name, value in after.items()}
            row = {
                "way": way,
                "tokens": tokens,
                "seconds": seconds,
                "trained_on": manifest["data"],
                "held_out": manifest["perplexity"],
                "ratio": ratios,
                "left": {name: (ratio - 1) / (result["before"][name] - 1) for name, ratio in ratios.items()},
            }
            print(row, flush=True)
            result["rows"].append(row)
            write(result, arguments.output)
    return result


def train(arguments: argparse.Namespace, way: str, tokens: int, folder: Path) -> float | None:
    """Train into a folder, unless it is there; seconds, None where some of them were spent earlier."""
    seconds = folder.with_name(f"{folder.name}.seconds")
    if folder.exists():
        return json.loads(seconds.read_text()) if seconds.exists() else None
    sources = [text.partition("#") for text in arguments.train]
    data = CalibrationOptions(
        data=tuple(source for source, _, _ in sources),
        field=tuple(field for _, _, field in sources),
        samples=max(1, tokens // arguments.seqlen),
        seqlen=arguments.seqlen,
        seed=arguments.seed,
    )
    values: dict[str, Any] = {
        "model": str(arguments.sliced),
        "output": folder,
        "teacher": arguments.dense,
        "data": data,
        "held_out": arguments.held_out,
        "learning_rate": arguments.learning_rate,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "resume": partial_path(folder).exists(),
    }
    start = time.perf_counter()
    finetune(FinetuneOptions(**values | WAYS[way]), progress)
    if values["resume"]:
        return None
    seconds.write_text(json.dumps(round(time.perf_counter() - start, 1)))
    return json.loads(seconds.read_text())


def measure(model: Any, texts: dict[str, Tokens]) -> dict[str, float]:
    """Perplexity on each text."""
    return {name: perplexity(model, tokens.batches).perplexity for name, tokens in texts.items()}


def progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", end="\r", flush=True)


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    texts = list(result["tests"])
    head = ["way", "tokens", "seconds"] + [f"{text} {kind}" for text in texts for kind in ("ratio", "left")]
    lines = [head, ["---"] * len(head)]
    lines.append(["sliced", "0", "-"] + [cell for text in texts for cell in (f"{result['before'][text]:.3f}", "100 %")])
    for row in result["rows"]:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        cells = [(f"{row['ratio'][text]:.3f}", f"{100 * row['left'][text]:.0f} %") for text in texts]
        lines.append([row["way"], str(row["tokens"]), seconds, *(cell for pair in cells for cell in pair)])
    heading = (
        f"{result['dense']}, {100 * result['kept']:.1f} % of its parameters. Ratio: perplexity over the dense model's; "
        "left: the share of the excess over 1 that is there after training.\n\n"
    )
    return heading + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(result: dict[str, Any], output: Path) -> None:
    """NAME.json and NAME.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_name(output.name + ".md").write_text(table(result), encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dense", help="the dense model: a folder, a hub id or a .gguf file")
    add("sliced", type=Path, help="the folder that eigenslice slice made of it")
    add("--train", action="append", required=True, help="SOURCE or SOURCE#FIELD; may be repeated: equal shares")
    add("--test", action="append", required=True, help="NAME=SOURCE or NAME=SOURCE#FIELD; may be repeated")
    add("--tokens", type=lambda text: [int(n) for n in listed(text)], default=[400_000], help="tokens to train on")
    add("--ways", type=listed, default=["lora", "full"], help=", ".join(WAYS))
    add("--seqlen", type=int, default=1024, help="tokens a window, for training and tests")
    add("--test-samples", type=int, default=16, help="windows of each test text, from its start")
    add("--held-out", type=int, default=8, help="windows that training measures itself on")
    add("--learning-rate", type=float, help="[that of the way]")
    add("--batch", type=int, default=4, help="windows a step")
    add("--seed", type=int, default=0)
    add("--device", help="torch device to measure on [a GPU if there is one]")
    add("--dtype", choices=["float32", "bfloat16"], help="[float32 on CPU]")
    add("--matmul", choices=["highest", "high", "medium"], default="highest", help="torch's float32 matmul precision")
    add("--work", type=Path, help="folder that keeps the trained models [a temporary one]")
    add("-o", "--output", type=Path, required=True, help="NAME, to which .json and .md are added")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.ways) - set(WAYS)
    if unknown:
        parser.error(f"no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_float32_matmul_precision(parsed.matmul)
    with tempfile.TemporaryDirectory() as folder:
        print(table(run(parsed, parsed.work or Path(folder))))


if __name__ == "__main__":
    main()
