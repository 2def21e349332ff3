"""Time and memory of slicing, beside one dense forward pass over the same tokens in the same process.

    python benchmarks/slicing.py MODEL [MODEL ...] --calibration ids.safetensors \\
        --run global="--slicing 0.25 --no-refit" --run per-block="--slicing 0.25 --basis per-block" \\
        -o benchmarks/results/NAME

writes NAME.json and NAME.md. A run is NAME=OPTIONS, as `eigenslice slice` takes them. Each model and run has a process
of its own, in which the dense pass and slicing take turns; the medians are compared. "forward" is the pass of all
tokens through transformers' own decoder layers, embeddings and head left out; "slicing" is all of `eigenslice slice`
after the imports: opening, hashing, forward, eigenvectors, fits, writing and verifying. Peak memory is that of a
process which only slices.
"""

import argparse
import json
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def forward_seconds(model: Any, batches: list[Any]) -> float:
    """Seconds in the decoder layers for one pass over all tokens."""
    device, spent = model.device, [0.0]
    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started: list[float] = []
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: started.append(clock())),
        layers[-1].register_forward_hook(lambda *_: spent.append(clock() - started[-1])),
    ]
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=batch.input_ids.to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(spent)


def measure(model_name: str, options: list[str], calibration: list[str], repeats: int) -> dict[str, Any]:
    """Medians of the dense pass and of slicing, which take turns; in this process."""
    from eigenslice.checkpoint.loading import load_model
    from eigenslice.cli import app
    from eigenslice.data import calibration_tokens
    from eigenslice.options.calibration_text import CalibrationOptions

    parser = argparse.ArgumentParser()
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    given = parser.parse_args(calibration)
    loaded = load_model(model_name, None, None)
    wanted = CalibrationOptions(data=tuple(given.calibration), samples=given.samples, seqlen=given.seqlen)
    tokens = calibration_tokens(wanted, loaded.tokenizer, loaded.model.config)
    dense, sliced = [], []
    for _ in range(repeats):
        dense.append(forward_seconds(loaded.model, tokens.batches))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            arguments = ["slice", model_name, "-o", f"{folder}/out", "--quiet", *calibration, *options]
            app(arguments, standalone_mode=False)
            sliced.append(time.perf_counter() - start)
    result = {
        "tokens": tokens.count,
        "forward_seconds": statistics.median(dense),
        "slicing_seconds": statistics.median(sliced),
        "ratio": statistics.median(sliced) / statistics.median(dense),
        "forward_all": dense,
        "slicing_all": sliced,
        "device": str(loaded.model.device),
    }
    if loaded.model.device.type == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def peak_bytes(model_name: str, options: list[str], calibration: list[str]) -> int:
    """Peak resident memory of a process that slices."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "eigenslice", "slice", model_name, "-o", str(folder / "out"), "--quiet"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run([*command, *calibration, *options], check=True)
    shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak > before, "a child before this one has needed more: its peak hides this one's"
    return peak * 1024


def one(arguments: argparse.Namespace) -> None:
    """Measure one model and run, and print it as JSON; the peak first, while no child has run."""
    options, calibration = shlex.split(arguments.options), shlex.split(arguments.calibrate)
    result: dict[str, Any] = {"peak_bytes": peak_bytes(arguments.models[0], options, calibration)}
    if arguments.repeats:
        result |= measure(arguments.models[0], options, calibration, arguments.repeats)
    print(json.dumps(result))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | run | tokens | forward, s | slicing, s | ratio | peak memory, MB |", "| --- " * 7 + "|"]
    for row in rows:
        timed = "forward_seconds" in row
        times = f"{row['forward_seconds']:.1f} | {row['slicing_seconds']:.1f} | {row['ratio']:.2f}" if timed else "| | "
        tokens = row.get("tokens", "")
        lines.append(f"| {row['model']} | {row['run']} | {tokens} | {times} | {row['peak_bytes'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--run", action="append", help="NAME=OPTIONS")
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="0 measures memory only")
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.options is not None:
        one(arguments)
        return
    calibrate = [part for name in arguments.calibration for part in ("--calibration", name)]
    calibrate += ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        for run in arguments.run:
            name, _, options = run.partition("=")
            command = [sys.executable, __file__, model, "--repeats", str(arguments.repeats)]
            command += [f"--options={options}", f"--calibrate={shlex.join(calibrate)}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = {"model": Path(model).name, "run": name} | json.loads(printed.splitlines()[-1])
            rows.append(row)
            print(row, flush=True)
    threads = torch.get_num_threads()
    content = {"torch": torch.__version__, "threads": threads, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_name(arguments.output.name + ".json").write_text(json.dumps(content, indent=2) + "\n")
    arguments.output.with_name(arguments.output.name + ".md").write_text(table(rows))


if __name__ == "__main__":
    main()
