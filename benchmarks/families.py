"""Quality on trained models of a dozen families: each model of zoo.py sliced, beside two naive ways to make it smaller.

    python benchmarks/zoo.py --text tinystories.json --tokenizer LLAMA_1MB --cache ZOO
    python benchmarks/families.py --zoo ZOO [--keep 0.85 0.7] [-o benchmarks/results/families.json] [KIND ...]
    python benchmarks/support.py --page    # the table in docs/support.md

Calibrated on training stories of the zoo, measured on stories that neither the model nor the calibration has seen: KL
from the dense model and perplexity over the dense model's. Everything else are the defaults of `eigenslice slice`.
The naive ways get as many stored parameters as eigenslice has used (see naive.py). llama is sliced to more sizes, so
that other families can be compared with it at the same share of the blocks' parameters.

The JSON file is written after each result. A result that is there stays, unless its kind is named on the command line
or its model or the settings have changed. So an interrupted run goes on, and KIND measures anew after a change of code.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from eigenslice import CalibrationOptions, EigensliceError, SliceOptions, __version__, slice_model
from eigenslice.checkpoint.loading import load_model
from eigenslice.data.batches import Batch
from families_table import REFERENCE, table
from naive import Channels, block_parameters, even, late, nearest_blocks, stored, with_channels, without_blocks
from scores import Score, compare
from zoo import RECORD, TEXT
from zoo_kinds import KINDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/families.json"
REFERENCE_SIZES = (0.92, 0.775, 0.6)
"""More sizes of the reference, so that its curve reaches around the other families' shares of block parameters."""
PROBES = 16
"""Windows that find the channels of a model: each expert has to see a token of them."""
BLOCK_ROLES = ("attention", "mlp", "shortcut")
"""The manifest's roles that are blocks' alone; its norms are left out: a model has 128 numbers outside of blocks."""


class Measurer:
    """One model of the zoo, its calibration and its test windows."""

    def __init__(self, kind: str, arguments: argparse.Namespace) -> None:
        self.kind, self.arguments = kind, arguments
        self.folder, self.text = arguments.zoo / kind, arguments.zoo / TEXT
        self.dense = load_model(str(self.folder), "cpu", "float32").model
        windows = load_file(self.text)
        self.tests = [Batch(windows["heldout"][: arguments.test_windows])]
        self.channels = Channels.of(self.dense, windows["train"][:PROBES])

    def row(self, keep: float) -> dict[str, Any]:
        """Slice to a share of the stored parameters, and measure the result and what is naive at the same size."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = (self.arguments.work or Path(temporary)) / f"{self.kind}-{keep:g}-{time.time_ns()}"
            calibration = CalibrationOptions(
                data=str(self.text), field="train", samples=self.arguments.samples, seqlen=self.arguments.seqlen
            )
            start = time.perf_counter()
            try:
                result = slice_model(
                    SliceOptions(
                        model=str(self.folder), output=folder, keep=keep, calibration=calibration, device="cpu"
                    )
                )
            except EigensliceError as error:
                return {"error": str(error)}
            row = sliced_row(result.manifest) | {"seconds": round(time.perf_counter() - start, 1)}
            naive = self.naive(result.manifest["parameters"]["stored"])
            models = [load_model(str(folder), "cpu", "float32").model, *(way.pop("model") for way in naive)]
            dense, *scores = compare(self.dense, models, self.tests)
        ways = [way | score_row(score, dense) for way, score in zip(naive, scores[1:], strict=True)]
        return row | score_row(scores[0], dense) | {"dense_perplexity": dense.perplexity, "naive": ways}

    def naive(self, most: int) -> list[dict[str, Any]]:
        """Models with about so many parameters: by magnitude at most so many, by blocks the nearest number."""
        width = self.channels.width_for(most)
        sizes = self.channels.sizes(width)
        in_blocks = block_parameters(self.dense, sizes)
        ways = [
            {
                "way": "magnitude",
                "what": f"width {width}",
                "kept": sum(sizes.values()) / stored(self.dense),
                "block_share": in_blocks / block_parameters(self.dense),
                "model": with_channels(self.dense, self.channels.largest(width)),
            }
        ]
        for name, choose in (("late blocks", late), ("even blocks", even)):
            dropped = nearest_blocks(self.dense, most, choose)
            model = without_blocks(self.dense, dropped)
            ways.append(
                {
                    "way": name,
                    "what": f"without blocks {', '.join(map(str, sorted(dropped)))}",
                    "kept": stored(model) / stored(self.dense),
                    "block_share": block_parameters(model) / block_parameters(self.dense),
                    "model": model,
                }
            )
        return ways


def sliced_row(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a result's form and size."""
    sizes = manifest["parameters"]
    before, after = ({role: sizes[of].get(role, 0) for role in BLOCK_ROLES} for of in ("dense_by_role", "by_role"))
    return {
        "form": manifest["form"],
        "saved_as": manifest["model_type"],
        "plan": manifest["plan"],
        "dense": {name: value for name, value in manifest.items() if name.startswith("dense_")},
        "stored": sizes["stored"],
        "kept": sizes["kept"],
        "block_share": sum(after.values()) / sum(before.values()),
        "by_role": {role: [before[role], after[role]] for role in BLOCK_ROLES},
    }


def score_row(score: Score, dense: Score) -> dict[str, float]:
    """KL in nats per token, perplexity ratio, and share of tokens with the dense model's first choice."""
    return {"kl": score.kl, "ratio": score.perplexity / dense.perplexity, "top1": score.top1}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing or named; the file is written after each result."""
    result = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"rows": []}
    settings = {"samples": arguments.samples, "seqlen": arguments.seqlen, "test_windows": arguments.test_windows}
    done = {(row["kind"], row["keep"]): row for row in result["rows"]}
    for kind in arguments.kinds or KINDS:
        if not (arguments.zoo / kind / RECORD).exists():
            print(f"{kind}: not in {arguments.zoo}", flush=True)
            continue
        record = json.loads((arguments.zoo / kind / RECORD).read_text(encoding="utf-8"))
        digest = hashlib.sha256((arguments.zoo / kind / "model.safetensors").read_bytes()).hexdigest()
        key = settings | {"model": digest}
        sizes = {*arguments.keep, *(REFERENCE_SIZES if kind == REFERENCE else ())}
        missing = [
            keep
            for keep in sorted(sizes, reverse=True)
            if arguments.kinds or done.get((kind, keep), {}).get("key") != key
        ]
        if not missing:
            continue
        measurer = Measurer(kind, arguments)
        for keep in missing:
            row = {"kind": kind, "keep": keep, "key": key, "trained": record["tokens"]} | measurer.row(keep)
            print({name: row.get(name) for name in ("kind", "keep", "plan", "kl", "ratio", "error")}, flush=True)
            done[kind, keep] = row
            write(done, arguments.output)
    return write(done, arguments.output)


def write(done: dict[tuple[str, float], dict[str, Any]], output: Path) -> dict[str, Any]:
    """The JSON file, rows in the order of the kinds."""
    versions = {"eigenslice": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    rows = sorted(done.values(), key=lambda row: (list(KINDS).index(row["kind"]), -row["keep"]))
    result = {"versions": versions, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help="measure these anew [what is missing of all]")
    add("--zoo", type=Path, default=Path.home() / ".cache/eigenslice/zoo", help="the cache folder of zoo.py")
    add("--keep", type=float, nargs="+", default=[0.85, 0.7], help="shares of the stored parameters")
    add("--samples", type=int, default=64, help="calibration sequences")
    add("--seqlen", type=int, default=256, help="tokens a calibration sequence")
    add("--test-windows", type=int, default=96, help="held-out windows of 256 tokens")
    add("--work", type=Path, help="folder that keeps the sliced models [a temporary one]")
    add("--threads", type=int, default=1)
    add("-o", "--output", type=Path, default=RESULTS, help="JSON file [benchmarks/results/families.json]")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    print(table(run(parsed)["rows"]))


if __name__ == "__main__":
    main()
