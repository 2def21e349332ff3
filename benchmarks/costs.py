"""Minutes that `slice --keep` takes on GPUs, by count: no GPU has run eigenslice yet.

    python benchmarks/costs.py -o benchmarks/results/costs

writes NAME.json and NAME.md. The operations are those that `eigenslice inspect` counts (`inspection/work.py`; a test
compares them with the products of a run). Each kind is divided by the rate that a GPU reaches in large products, as far
as its maker and published measurements tell. Nothing overlaps here, and nothing waits: the figures are a rough guide.

The models are Llamas, of which no weight is needed. Each GPU of several passes its share of the tokens, and solves its
share of the regressions. Memory is that of `fit/working_memory.py`, which `inspect` shows, too.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from eigenslice.algebra.refit import COMBINATIONS, RIDGES
from eigenslice.checkpoint.empty import empty_model
from eigenslice.fit.working_memory import working_bytes
from eigenslice.inspection.estimate import PASSES, STREAMS_OF_A_BLOCK
from eigenslice.inspection.work import Work, kept_neurons, passing_tokens, work_by_stage
from eigenslice.model.anatomy import Anatomy
from eigenslice.runtime.offload import fits_beside
from eigenslice.slicing.memory import WRITING

SAMPLES, LENGTH = 128, 2048
"""The default calibration."""
BYTES = 2
"""Bytes of a weight and of an activation, bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, by what it reaches in large products.

    Attributes:
        name: Its name.
        bfloat16, tf32, float32: Operations a second.
        factor: Operations a second of Cholesky factors and triangular solutions in float32.
        bus: Bytes a second from the host.
        memory: Bytes.
    """

    name: str
    bfloat16: float
    tf32: float
    float32: float
    factor: float
    bus: float
    memory: float


H100 = Gpu("H100", 450e12, 250e12, 45e12, 20e12, 45e9, 80e9)
RTX4090 = Gpu("RTX 4090", 130e12, 65e12, 55e12, 15e12, 22e9, 24e9)

LLAMAS: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
COLUMNS = (
    ("8B", H100, 1),
    ("8B", RTX4090, 1),
    ("32B", RTX4090, 1),
    ("70B", H100, 1),
    ("70B", H100, 8),
    ("405B", H100, 8),
)


def anatomy_of(name: str) -> Anatomy:
    """The anatomy of a Llama, from its config alone."""
    config = LlamaConfig(**LLAMAS[name])
    return Anatomy.of_model(config, empty_model(config), tied=False)


def fit_operations(inputs: int, outputs: int) -> float:
    """Operations of a regression: a factor for each ridge, solved for a few outputs, and one for all outputs."""
    factors = (len(RIDGES) + 1) * inputs**3 / 3
    return factors + 2 * inputs**2 * (len(RIDGES) * COMBINATIONS + 2 * outputs)


def seconds(anatomy: Anatomy, work: Work, gpu: Gpu, devices: int) -> dict[str, float]:
    """Seconds of a stage by the kind of arithmetic."""
    width, neurons = anatomy.width, anatomy.neuron_count
    vocabulary = anatomy.tokens
    block = 2 * sum(anatomy.block_sizes) / anatomy.block_count + 2 * LENGTH * width  # half of attention is masked
    fits = work.narrow_fits * fit_operations(width, width) + work.broad_fits * fit_operations(neurons, width)
    # The stream and the targets of fits are bfloat16; products with float32 numbers, such as tokens' weights, are TF32
    times = {
        "forward": block * (work.blocks + WRITING * work.written) / gpu.bfloat16,
        "Gram matrices": (width**2 * work.narrow + neurons**2 * work.broad) / gpu.tf32,  # half of each is mirrored
        "products of fits": 2 * width * (width * work.squares + neurons * work.neurons) / gpu.tf32,
        "head": 2 * width * vocabulary * work.head / gpu.float32,
        "solutions": fits / gpu.factor,
    }
    return {kind: time / devices for kind, time in times.items()}


def column(name: str, gpu: Gpu, devices: int) -> dict[str, Any]:
    """Minutes of a model on some GPUs, by stage and by kind."""
    anatomy, tokens = anatomy_of(name), SAMPLES * LENGTH
    writes = anatomy.parameters * BYTES < 0.8 * gpu.memory
    stages = {
        stage: seconds(anatomy, work, gpu, devices)
        for stage, work in work_by_stage(anatomy, tokens, writes=writes).items()
    }
    passing = passing_tokens(tokens, writes=writes)
    held = passing / devices * (2 * anatomy.width + 2 * anatomy.neuron_count) * BYTES
    weights = PASSES * anatomy.parameters * BYTES
    working = working_bytes(anatomy, torch.bfloat16, kept_neurons(anatomy), 1)
    streams = 0 if fits_beside(held, working, gpu.memory) else passing / devices * anatomy.width * BYTES
    bus = (weights + STREAMS_OF_A_BLOCK * anatomy.block_count * streams) / gpu.bus
    kinds = {kind: sum(stage[kind] for stage in stages.values()) / 60 for kind in next(iter(stages.values()))}
    return {
        "model": name,
        "gpu": gpu.name,
        "devices": devices,
        "writes_text": writes,
        "activations": "device" if not streams else "host",
        "working_bytes": working,
        "minutes": sum(kinds.values()) + bus / 60,
        "kinds": kinds | {"bus": bus / 60},
        "stages": {stage: sum(times.values()) / 60 for stage, times in stages.items()},
    }


def table(columns: list[dict[str, Any]]) -> str:
    """The columns in Markdown."""
    heads = [f"{c['model']}, {c['devices']} x {c['gpu']}" for c in columns]
    lines = [["minutes", *heads], ["---"] * (1 + len(heads))]
    lines.append(["**all**", *(f"**{c['minutes']:.0f}**" for c in columns)])
    lines += [[kind, *(f"{c['kinds'][kind]:.1f}" for c in columns)] for kind in columns[0]["kinds"]]
    lines.append(["activations live on", *(c["activations"] for c in columns)])
    lines.append(["GB beside the activations", *(f"{c['working_bytes'] / 1e9:.0f}" for c in columns)])
    lines.append(["the model writes text", *("yes" if c["writes_text"] else "no" for c in columns)])
    heading = (
        f"Counted, not measured, a rough guide: `slice --keep 0.75` with all defaults ({SAMPLES} x {LENGTH} tokens), "
        "Llamas in bfloat16.\n\n"
    )
    return heading + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="NAME, to which .json and .md are added")
    output: Path = parser.parse_args(arguments).output
    columns = [column(*one) for one in COLUMNS]
    rates = {gpu.name: asdict(gpu) for gpu in (H100, RTX4090)}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"gpus": rates, "columns": columns}, indent=1) + "\n"
    output.with_name(output.name + ".json").write_text(text, encoding="utf-8")
    output.with_name(output.name + ".md").write_text(table(columns), encoding="utf-8")
    print(table(columns))


if __name__ == "__main__":
    main()
