"""Quality over size: eigenslice, the paper's method and others on the same calibration and test tokens.

    python benchmarks/quality.py MODEL --calibration mixed --test wiki=wikitext2 --test stories=tinystories \\
        --sizes 0.9,0.85,0.75,0.6 --methods ours,paper-per-block,drop-blocks,width-pruning,slimgpt,flap \\
        --work WORK -o benchmarks/results/NAME

writes NAME.json, NAME.md and NAME.png. For each method and size: perplexity over the dense model's, KL(dense || model)
in nats per token and the share of tokens with the same most likely prediction, on each test text. Size is stored
parameters over the dense model's, tied weights once, shortcuts included; "kept" is what a method really keeps.

The methods: eigenslice with various options, and the paper's (candidates.py); dropped blocks and width pruning
(baselines.py); published ones without training (rivals/).

A test text is NAME=SOURCE or NAME=SOURCE#FIELD, with SOURCE as `eigenslice eval --data` takes it.

With --work, results stay in the folder WORK/METHOD-SIZE and are not made again: an interrupted benchmark goes on.
Delete that folder to make one anew.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from baselines import stored
from candidates import PRUNED, SLICED, Candidate, Pruner, Slicer, record, recorded
from eigenslice import CalibrationOptions, EigensliceError, __version__
from eigenslice.checkpoint.loading import load_model
from eigenslice.data import Tokens, calibration_tokens, evaluation_tokens
from eigenslice.data.texts import BUILTIN, PRESETS
from eigenslice.errors import OptionsError
from report import chart, table
from rivals import RIVALS
from scores import Score, compare

Job = tuple[str, float]
"""A method and a size."""


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make and measure all models; what is there so far is written after each group of them."""
    calibration = CalibrationOptions(
        data=tuple(arguments.calibration or ["mixed"]),
        field=tuple(arguments.field or ()),
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        seed=arguments.seed,
    )
    tests = dict(text_option(text, arguments.test_samples, arguments.seqlen) for text in arguments.test)
    check_work(work, {"model": arguments.model, "calibration": calibration.model_dump(mode="json")})
    jobs = [(method, size) for method in arguments.methods for size in arguments.sizes]
    failed: dict[Job, dict[str, Any]] = {}

    slicer = Slicer(arguments.model, calibration, arguments.device, arguments.dtype, work)
    candidates = attempt([job for job in jobs if job[0] in SLICED], slicer, failed)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    dense, config = loaded.model, loaded.model.config.get_text_config()
    tokens = calibration_tokens(calibration, loaded.tokenizer, config)
    pruner = Pruner(dense, tokens.batches, work)
    candidates |= attempt([job for job in jobs if job[0] in PRUNED], pruner, failed)

    # A preset has a part for each purpose; the same file or split is the same text
    own = {source for source in calibration.data if source not in {BUILTIN, *PRESETS}}
    seen = {name for name, test in tests.items() if own & set(test.data)}
    texts = {name: evaluation_tokens(test, loaded.tokenizer, config) for name, test in tests.items()}
    result: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "parameters": stored(dense),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "calibration": tokens.description,
        "tests": {},
        "versions": {
            "eigenslice": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(dense.device),
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
        },
        "rows": list(failed.values()),
    }
    key = {"dtype": result["dtype"]} | {name: test.model_dump(mode="json") for name, test in tests.items()}
    order = [job for job in jobs if job in candidates]
    done: dict[Job, dict[str, Any]] = dict(failed)
    for start in range(0, max(1, len(order)), arguments.together):
        group = order[start : start + arguments.together]
        rows = measure([candidates[job] for job in group], dense, texts, work / "dense", key)
        done |= dict(zip(group, rows, strict=True))
        result["tests"] = {
            name: about | {"calibrated_on": name in seen} for name, about in recorded(work / "dense")["tests"].items()
        }
        result["rows"] = [done[job] for job in jobs if job in done]
        write(result, arguments.output)
    return result


def attempt(
    jobs: list[Job], make: Callable[[str, float], Candidate], failed: dict[Job, dict[str, Any]]
) -> dict[Job, Candidate]:
    """Candidates, and in `failed` a row for each job that has none, which says why."""
    made = {}
    for job in jobs:
        try:
            made[job] = make(*job)
        except EigensliceError as error:
            failed[job] = {"method": job[0], "size": job[1], "error": error.found}
            print(failed[job], flush=True)
    return made


def measure(
    group: list[Candidate], dense: Any, texts: dict[str, Tokens], dense_folder: Path, key: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of candidates that are loaded together beside the dense model.

    Args:
        group: The candidates; those measured before aren't loaded.
        dense: The dense model.
        texts: Test tokens by name.
        dense_folder: Holds the dense model's record.
        key: What a measurement depends on; one with another key doesn't count.
    """
    missing = [candidate for candidate in group if recorded(candidate.folder).get("key") != key]
    if missing or recorded(dense_folder).get("key") != key:
        models = [candidate.load() for candidate in missing]
        scores = {name: compare(dense, models, tokens.batches, progress(name)) for name, tokens in texts.items()}
        expected = {name: score[0] for name, score in scores.items()}
        dense_folder.mkdir(exist_ok=True)
        about = {
            name: texts[name].description | {"predicted": score.tokens, "perplexity": score.perplexity}
            for name, score in expected.items()
        }
        record(dense_folder, {"key": key, "tests": about})
        for number, candidate in enumerate(missing, 1):
            tests = {name: scores_row(score[number], expected[name]) for name, score in scores.items()}
            record(candidate.folder, {"key": key, "tests": tests})
    rows = []
    for candidate in group:
        tests = recorded(candidate.folder)["tests"]
        ratios = [test["ratio"] for test in tests.values()]
        mean = None if None in ratios else math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append(candidate.row | {"tests": tests, "ratio": mean})
        print(rows[-1], flush=True)
    return rows


def scores_row(score: Score, dense: Score) -> dict[str, Any]:
    """A score as JSON; null where a model is broken, so that its perplexity is no float."""
    sound = math.isfinite(score.perplexity) and math.isfinite(score.kl)
    return {
        "perplexity": score.perplexity if sound else None,
        "ratio": score.perplexity / dense.perplexity if sound else None,
        "kl": score.kl if sound else None,
        "top1": score.top1 if sound else None,
    }


def text_option(text: str, samples: int, seqlen: int) -> tuple[str, CalibrationOptions]:
    """NAME=SOURCE or NAME=SOURCE#FIELD."""
    name, _, source = text.partition("=")
    data, _, field = source.partition("#")
    if not name or not data:
        raise OptionsError(f"--test {text}", allowed="NAME=SOURCE or NAME=SOURCE#FIELD", next_step="name the text")
    return name, CalibrationOptions(data=data, field=field or None, samples=samples, seqlen=seqlen)


def check_work(work: Path, settings: dict[str, Any]) -> None:
    """What is in the work folder must have been made from the same model and calibration."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise OptionsError(
            f"{work} holds results of another model or calibration, see {path}",
            allowed="a --work folder for each model and calibration",
            next_step="name another folder",
        )
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def progress(name: str) -> Callable[[int, int], None]:
    return lambda done, total: print(f"{name}: {done} of {total} batches", end="\r", flush=True)


def write(result: dict[str, Any], output: Path) -> None:
    """NAME.json, NAME.md and NAME.png."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_name(output.name + ".md").write_text(table(result), encoding="utf-8")
    chart(result, output.with_name(output.name + ".png"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def sizes(text: str) -> list[float]:
        return [float(part) for part in listed(text)]

    methods = [*SLICED, *PRUNED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a folder, a hub id or a .gguf file")
    add("--calibration", action="append", help="as eigenslice slice --calibration; may be repeated [mixed]")
    add("--field", action="append", help="as eigenslice slice --field")
    add("--test", action="append", required=True, help="NAME=SOURCE or NAME=SOURCE#FIELD; may be repeated")
    add("--sizes", type=sizes, default=[0.9, 0.85, 0.75, 0.6], help="shares of the stored parameters")
    usual = [name for name in methods if name not in RIVALS and not name.endswith(("-given", "-quarter"))]
    add("--methods", type=listed, default=usual, help=f"{', '.join(methods)} [{', '.join(usual)}]")
    add("--samples", type=int, default=64, help="calibration sequences")
    add("--seqlen", type=int, default=1024, help="tokens a sequence, for calibration and tests")
    add("--test-samples", type=int, default=64, help="windows of each test text, from its start")
    add("--together", type=int, default=4, help="models in memory at once, beside the dense one")
    add("--seed", type=int, default=0)
    add("--device", help="torch device [a GPU if there is one]")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="to evaluate in [float32 on CPU]")
    add("--matmul", choices=["highest", "high", "medium"], default="highest", help="float32 products in evaluations")
    add("--work", type=Path, help="folder that keeps the sliced models [a temporary one]")
    add("-o", "--output", type=Path, required=True, help="NAME, to which .json, .md and .png are added")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.methods) - set(methods)
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(methods)}")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_float32_matmul_precision(parsed.matmul)
    with tempfile.TemporaryDirectory() as folder:
        print(table(run(parsed, parsed.work or Path(folder))))


if __name__ == "__main__":
    main()
