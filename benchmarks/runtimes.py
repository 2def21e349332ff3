"""Tokens per second of a dense and a sliced model in llama.cpp and OpenVINO, side by side.

    python benchmarks/runtimes.py DENSE SLICED... --runtimes llama.cpp,openvino --type f16 --work WORK \\
        -o benchmarks/results/NAME.json

Each model is exported once (into WORK, where it stays). Then all models take turns: a prompt of `--prompt` tokens, then
`--tokens` tokens one after the other, `--rounds` times. "speedup" is the median, over rounds, of a model's tokens per
second over the first model's in the same round: other work on the machine hits both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from eigenslice import ExportOptions, export_model
from eigenslice.export.gguf.llama_cpp import LlamaCpp
from eigenslice.export.openvino import OpenVino

Round = tuple[float, float]
"""Tokens per second of the prompt, and of the tokens after it."""
SUFFIX = {"llama.cpp": ".gguf", "openvino": ""}


def prepare(model: str, runtime: str, kind: str, work: Path) -> Path:
    """Export a model, unless it is there."""
    output = work / f"{Path(model).name}-{runtime}-{kind}{SUFFIX[runtime]}"
    if not output.exists():
        to = "gguf" if runtime == "llama.cpp" else "openvino"
        export_model(ExportOptions(model=model, output=output, to=to, type=kind))
    return output


def run_llama_cpp(path: Path, threads: int, context: int) -> Callable[[list[int], int], Round]:
    """A function that runs one round; llama-server measures the times itself."""
    runtime = LlamaCpp(path, context=context, threads=threads)

    def run(prompt: list[int], tokens: int) -> Round:
        times = runtime.complete(prompt, tokens, cache_prompt=False)["timings"]
        return times["prompt_per_second"], times["predicted_per_second"]

    return run


def run_openvino(folder: Path, threads: int, context: int) -> Callable[[list[int], int], Round]:
    """A function that runs one round, greedily."""
    runtime = OpenVino(folder, threads, exact=False)

    def run(prompt: list[int], tokens: int) -> Round:
        ids = list(prompt)
        start = time.perf_counter()
        following = int(np.argmax(runtime.logits(ids)[-1]))
        middle = time.perf_counter()
        for _ in range(tokens):
            ids.append(following)
            following = int(np.argmax(runtime.logits(ids)[-1]))
        return len(prompt) / (middle - start), tokens / (time.perf_counter() - middle)

    return run


LOADERS = {"llama.cpp": run_llama_cpp, "openvino": run_openvino}


def measure(arguments: argparse.Namespace, runtime: str) -> list[dict[str, Any]]:
    """All models in one runtime, in turns."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = [prepare(model, runtime, arguments.type, arguments.work) for model in arguments.models]
    context = arguments.prompt + arguments.tokens + 8
    runners = [LOADERS[runtime](file, arguments.threads, context) for file in files]
    configs = [AutoConfig.from_pretrained(model) for model in arguments.models]
    rounds: list[list[Round]] = [[] for _ in runners]
    for number in range(arguments.rounds + 1):
        # Another prompt each time: what is cached can't help. The first round warms up
        generator = np.random.default_rng(number)
        prompt = generator.integers(10, configs[0].vocab_size, arguments.prompt).tolist()
        for runner, results in zip(runners, rounds, strict=True):
            result = runner(prompt, arguments.tokens)
            if number:
                results.append(result)
    rows = []
    for model, config, file, results in zip(arguments.models, configs, files, rounds, strict=True):
        size = file.stat().st_size if file.is_file() else sum(f.stat().st_size for f in file.glob("openvino_model.*"))
        rows.append(
            {
                "model": Path(model).name,
                "runtime": runtime,
                "type": arguments.type,
                "width": config.hidden_size,
                "megabytes": round(size / 1e6, 1),
                "prompt_tokens_per_second": round(statistics.median(p for p, _ in results), 1),
                "tokens_per_second": round(statistics.median(t for _, t in results), 1),
                "speedup": [
                    round(
                        statistics.median(ours[i] / first[i] for ours, first in zip(results, rounds[0], strict=True)), 2
                    )
                    for i in (0, 1)
                ],
                "rounds": [[round(p, 1), round(t, 1)] for p, t in results],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--runtimes", default="llama.cpp,openvino")
    parser.add_argument("--type", default="f16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for runtime in arguments.runtimes.split(",") for row in measure(arguments, runtime)]
    settings = {key: getattr(arguments, key) for key in ("prompt", "tokens", "rounds", "threads")}
    machine = {"machine": platform.machine(), "processor": _processor()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": settings | machine, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print({key: value for key, value in row.items() if key != "rounds"})


def _processor() -> str:
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
