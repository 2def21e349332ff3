"""Ways to make a mixture of experts smaller, at the same size: fewer experts, fewer neurons of each expert, and both.

    python benchmarks/zoo.py --text tinystories.json --tokenizer LLAMA_1MB --cache ZOO qwen3_moe mixtral deepseek_v3
    python benchmarks/experts.py --zoo ZOO [--keep 0.75] [-o benchmarks/results/experts.json] [KIND ...]

Models, calibration and measure are those of families.py. The size is that of the model with the most experts that
stores at most `--keep` of the parameters, without any other cut. Every other way stores at most as many.

- "REAP": the experts go whose output's norm times the router's weight is least, as a mean over their tokens (arXiv
  2510.13999). Nothing is fitted.
- "choice": eigenslice's choice of experts, without a fit; "experts": with the fit.
- "neurons": all experts lose neurons. "both": half as many experts as in "experts" go, and neurons.
- "planner": what `--keep` finds, heads, blocks and width included.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from eigenslice import CalibrationOptions, SliceOptions, __version__, slice_model
from eigenslice.checkpoint.loading import load_model
from eigenslice.data.batches import Batch
from eigenslice.model.anatomy import Anatomy
from eigenslice.plan.forms import choose_form
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import Sizes
from eigenslice.stream.runner import has_experts
from families import score_row, sliced_row
from scores import compare
from zoo import RECORD, TEXT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/experts.json"
KINDS = ("qwen3_moe", "mixtral", "deepseek_v3")
WAYS = ("choice", "experts", "neurons", "both", "planner")
STEP = 4
"""Divisor of the number of neurons: finer than the default, so that all ways have nearly the same size. A kernel of
transformers takes rows of whole 16 bytes alone, which are four numbers of float32."""


def ways(anatomy: Anatomy, keep: float) -> dict[str, dict[str, Any]]:
    """Options of `slice` for each way."""

    def stored(sizes: Sizes) -> int:
        return stored_parameters(anatomy, choose_form(anatomy, sizes, tied=anatomy.can_stay_tied))

    every, step, whole = anatomy.expert_count, anatomy.expert_groups, Sizes(anatomy.width)
    fitting = [
        n
        for n in range(anatomy.fewest_experts, every, step)
        if stored(replace(whole, experts=n)) <= keep * anatomy.parameters
    ]
    few = replace(whole, experts=max(fitting))
    most = stored(few)

    def with_neurons(sizes: Sizes) -> dict[str, Any]:
        counts = range(STEP, anatomy.neuron_count + 1, STEP)
        neurons = max(n for n in counts if stored(replace(sizes, neurons=n)) <= most)
        return {"experts": sizes.experts or every, "neurons": neurons}

    half = replace(whole, experts=every - (every - max(fitting)) // (2 * step) * step)
    return {
        "choice": {"experts": max(fitting), "refit": False},
        "experts": {"experts": max(fitting)},
        "neurons": with_neurons(whole),
        "both": with_neurons(half),
        "planner": {"keep": most / anatomy.parameters, "multiple": STEP},
    }


def reap(model: Any, windows: Tensor, keep: int) -> Any:
    """Return the model with so many experts in each mixture, equally many of each group, by REAP's choice."""
    anatomy = Anatomy.of_config(model.config)
    table, seen = anatomy.table, {}
    layers = {n: layer for n, layer in enumerate(model.get_submodule(table.layers)) if has_experts(layer, table.mlp)}
    hooks = [
        layer.get_submodule(table.mlp.experts).register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args}))
        for n, layer in layers.items()
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    kept, groups = {}, anatomy.expert_groups
    for number, layer in layers.items():
        hidden, index, weights = (x.flatten(0, -2) for x in seen[number])
        missed = [
            mean_norm(layer.get_submodule(table.mlp.experts), n, hidden, index, weights)
            for n in range(anatomy.expert_count)
        ]
        best = torch.tensor(missed).view(groups, -1).argsort(dim=-1, descending=True)[:, : keep // groups]
        kept[number] = (best + torch.arange(groups)[:, None] * (anatomy.expert_count // groups)).flatten().sort().values
    config = type(model.config).from_dict(model.config.to_dict())
    setattr(config, table.experts_field or "", keep)
    smaller = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        cut = tensor.shape != shapes[name]
        tensors[name] = tensor[kept[int(name.removeprefix(table.layers + ".").partition(".")[0])]] if cut else tensor
    smaller.load_state_dict(tensors)
    return smaller.eval()


def mean_norm(experts: Any, number: int, hidden: Tensor, index: Tensor, weights: Tensor) -> float:
    """Return the mean over an expert's tokens of its output's norm, times the router's weight; 0 without a token."""
    tokens, place = torch.where(index == number)
    if not len(tokens):
        return 0.0
    with torch.no_grad():
        written = experts(hidden[tokens], torch.full_like(tokens, number)[:, None], weights[tokens, place, None])
    return float(written.norm(dim=-1).mean())


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Slice a model in each way, and measure all results."""
    folder, text = arguments.zoo / kind, arguments.zoo / TEXT
    dense = load_model(str(folder), "cpu", "float32").model
    calibration = CalibrationOptions(data=str(text), field="train", samples=arguments.samples, seqlen=arguments.seqlen)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, options in ways(Anatomy.of_config(dense.config), arguments.keep).items():
            if name not in arguments.ways:
                continue
            output, start = Path(temporary) / name, time.perf_counter()
            result = slice_model(
                SliceOptions(model=str(folder), output=output, calibration=calibration, device="cpu", **options)
            )
            rows.append(
                {"way": name, "options": options}
                | sliced_row(result.manifest)
                | {"seconds": round(time.perf_counter() - start, 1)}
            )
        windows = load_file(text)
        models = [load_model(str(Path(temporary) / row["way"]), "cpu", "float32").model for row in rows]
        few = next(row for row in rows if row["way"] == "experts")
        models.append(reap(dense, windows["train"][: arguments.samples], few["plan"]["experts"]))
        rows.append(
            {name: few[name] for name in ("stored", "kept", "block_share")} | {"way": "REAP", "plan": few["plan"]}
        )
        tests = [Batch(windows["heldout"][: arguments.test_windows])]
        first, *scores = compare(dense, models, tests)
    rows = [row | score_row(score, first) for row, score in zip(rows, scores, strict=True)]
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {"kind": kind, "trained": record["tokens"], "dense_perplexity": first.perplexity, "ways": rows}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS) + " [all]")
    add("--zoo", type=Path, default=Path.home() / ".cache/eigenslice/zoo", help="the cache folder of zoo.py")
    add("--keep", type=float, default=0.75, help="largest share of the stored parameters")
    add("--ways", nargs="+", default=WAYS, choices=WAYS, help="ways beside REAP; experts is needed [all]")
    add("--samples", type=int, default=128, help="calibration sequences")
    add("--seqlen", type=int, default=256, help="tokens a calibration sequence")
    add("--test-windows", type=int, default=96, help="held-out windows of 256 tokens")
    add("--threads", type=int, default=1)
    add("-o", "--output", type=Path, default=RESULTS, help="JSON file [benchmarks/results/experts.json]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    versions = {"eigenslice": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    settings = {name: getattr(parsed, name) for name in ("keep", "samples", "seqlen", "test_windows")}
    there = json.loads(parsed.output.read_text(encoding="utf-8"))["models"] if parsed.output.exists() else []
    done = {model["kind"]: model for model in there}
    for kind in parsed.kinds or KINDS:
        done[kind] = model = measure(kind, parsed)
        for row in model["ways"]:
            print(
                kind,
                row["way"],
                row["plan"],
                f"{row['kept']:.4f} KL {row['kl']:.4f}",
                f"x{row['ratio']:.4f}",
                flush=True,
            )
        content = {"versions": versions, "settings": settings, "models": list(done.values())}
        parsed.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
