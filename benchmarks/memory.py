"""Peak memory of slicing over the number of blocks, on random Llamas: it has to stay the same.

    python benchmarks/memory.py --widths 256 512 1024 --blocks 10 20 40 \\
        --run no-refit="--no-refit --slicing 0.25" --run refit="--slicing 0.25" -o benchmarks/results/memory

writes NAME.json and NAME.md. A run is NAME=OPTIONS, as `eigenslice slice` takes them. Each run is a process of its own,
on 8 sequences of 256 random tokens. Peak memory is the process's largest resident memory, a few files of Python and
torch included. Beside it stands what `eigenslice inspect` counts.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eigenslice.checkpoint.source import open_source
from eigenslice.inspection.memory_need import memory_need
from eigenslice.model.dense import DenseModel

MIB = 1024**2
VOCABULARY, SEQUENCES, TOKENS, HEAD = 1000, 8, 256, 64


def save_model(width: int, blocks: int, dtype: str, folder: Path) -> int:
    """Save a random Llama; the bytes of one of its blocks in float32, in which it runs on a CPU."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 21 // 8,
        num_hidden_layers=blocks,
        num_attention_heads=width // HEAD,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def slice_and_watch(model: Path, options: str, calibration: Path) -> tuple[int, float]:
    """Peak resident memory in bytes, and seconds, of a process that slices; on Linux.

    `getrusage` can't tell: a process's peak there begins with that of the one that has started it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "eigenslice", "slice", str(model), "-o", f"{folder}/out", "--quiet"]
        command += ["--calibration", str(calibration), "--device", "cpu", *shlex.split(options)]
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))])
            time.sleep(0.01)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return peak, time.perf_counter() - start


def counted_bytes(model: Path, options: str) -> int:
    """The peak that is counted before a run."""
    need = memory_need(DenseModel(open_source(str(model))), SEQUENCES * TOKENS, torch.float32)
    return (need.plain if "--no-refit" in options or "per-block" in options else need.refitted).host


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("width", "dtype", "block, MiB", "run", "blocks", "peak memory, MiB", "counted, MiB", "seconds")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        sizes = f"{row['width']} | {row['dtype']} | {row['block_bytes'] / MIB:.1f}"
        found = f"{row['peak_bytes'] / MIB:.0f} | {row['counted_bytes'] / MIB:.0f} | {row['seconds']:.1f}"
        lines.append(f"| {sizes} | {row['run']} | {row['blocks']} | {found} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--run", action="append", required=True, help="NAME=OPTIONS")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, calibration = Path(name), Path(name) / "calibration.safetensors"
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
        save_file({"calibration": ids}, calibration)
        cases = [(w, d, b) for w in arguments.widths for d in arguments.dtypes for b in arguments.blocks]
        for width, dtype, blocks in cases:
            model = folder / f"{width}-{dtype}-{blocks}"
            size = save_model(width, blocks, dtype, model)
            for run in arguments.run:
                title, _, options = run.partition("=")
                peak, seconds = slice_and_watch(model, options, calibration)
                row = {"width": width, "dtype": dtype, "block_bytes": size, "run": title, "blocks": blocks}
                row["counted_bytes"] = counted_bytes(model, options)
                rows.append(row | {"peak_bytes": peak, "seconds": seconds})
                print(rows[-1], flush=True)
    content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_name(arguments.output.name + ".json").write_text(json.dumps(content, indent=2) + "\n")
    arguments.output.with_name(arguments.output.name + ".md").write_text(table(rows))


if __name__ == "__main__":
    main()
