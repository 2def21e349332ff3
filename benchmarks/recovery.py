"""What healing gives back: the share of the excess perplexity that is won back, over tokens trained on.

    eigenslice slice MODEL.gguf -o sliced --keep 0.75
    python benchmarks/recovery.py MODEL.gguf sliced --train wiki.txt --train alpaca.json#instruction,output \\
        --test wiki=wiki.test.txt --test docstrings=builtin --tokens 100000,400000 --ways lora,full \\
        --work WORK -o benchmarks/results/NAME

writes NAME.json, NAME.md and NAME.png. The ratio is a model's perplexity over the dense one's, the excess is the ratio
less 1. "won back" is the share of the sliced model's excess that is gone after training, of the ratios' geometric mean
over the texts. Ways: full (all weights) and lora, each distilled from the dense model as `slice --heal` does it, and
full-next-token, lora-next-token without a teacher. Texts are SOURCE or SOURCE#FIELD, as `eigenslice slice
--calibration` takes SOURCE. "tokens" counts the text that the dense model writes, too.

With --work, trained models stay in WORK/WAY-TOKENS and aren't made again; an interrupted training goes on.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from eigenslice import CalibrationOptions, __version__
from eigenslice.checkpoint.loading import load_model
from eigenslice.data import Tokens, evaluation_tokens
from eigenslice.evaluation.perplexity import perplexity
from eigenslice.finetune import FinetuneOptions, finetune
from eigenslice.healing.heal import WINDOW
from eigenslice.runtime.output import partial_path
from quality import text_option

WAYS: dict[str, dict[str, Any]] = {
    "full": {"full": True, "distill": 1.0},
    "lora": {"full": False, "distill": 1.0},
    "full-next-token": {"teacher": None, "full": True},
    "lora-next-token": {"teacher": None, "full": False},
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
        "mean_before": geometric_mean(value / expected[name] for name, value in before.items()),
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
                "mean": geometric_mean(ratios.values()),
                "won_back": 1 - (geometric_mean(ratios.values()) - 1) / (result["mean_before"] - 1),
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
        seqlen=arguments.seqlen,
        seed=arguments.seed,
    )
    values: dict[str, Any] = {
        "model": str(arguments.sliced),
        "output": folder,
        "teacher": arguments.dense,
        "data": data,
        "tokens": tokens,
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
    head = ["way", "tokens", "seconds", *texts, "mean", "won back"]
    lines = [head, ["---"] * len(head)]
    before = [f"{result['before'][text]:.3f}" for text in texts]
    lines.append(["sliced", "0", "-", *before, f"{result['mean_before']:.3f}", "-"])
    for row in result["rows"]:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        ratios = [f"{row['ratio'][text]:.3f}" for text in texts]
        mean = [f"{row['mean']:.3f}", f"{100 * row['won_back']:.0f} %"]
        lines.append([row["way"], str(row["tokens"]), seconds, *ratios, *mean])
    heading = (
        f"{result['dense']}, {100 * result['kept']:.1f} % of its parameters. Perplexity over the dense model's; mean: "
        "geometric; won back: the share of the mean's excess over 1 that is gone after training.\n\n"
    )
    return heading + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def chart(result: dict[str, Any], path: Path) -> None:
    """Share of the excess that is won back over the tokens trained on, one line a way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        points = sorted((row["tokens"], 100 * row["won_back"]) for row in result["rows"] if row["way"] == way)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=way)
    axes.set_xscale("log")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("excess perplexity won back, %")
    axes.set_title(f"{result['dense']}, {100 * result['kept']:.1f} % of the parameters")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write(result: dict[str, Any], output: Path) -> None:
    """Write NAME.json, NAME.md and NAME.png."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_name(output.name + ".md").write_text(table(result), encoding="utf-8")
    chart(result, output.with_name(output.name + ".png"))


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
    add("--ways", type=listed, default=["full", "lora"], help=", ".join(WAYS))
    add("--seqlen", type=int, default=WINDOW, help="tokens a window, for training and tests")
    add("--test-samples", type=int, default=16, help="windows of each test text, from its start")
    add("--held-out", type=int, help="windows that training measures itself on [as finetune]")
    add("--learning-rate", type=float, help="[that of the way]")
    add("--batch", type=int, help="windows a step [as finetune]")
    add("--seed", type=int, default=0)
    add("--device", help="torch device to measure on [a GPU if there is one]")
    add("--dtype", choices=["float32", "bfloat16"], help="[float32 on CPU]")
    add("--matmul", choices=["highest", "high", "medium"], default="highest", help="float32 products in evaluations")
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
