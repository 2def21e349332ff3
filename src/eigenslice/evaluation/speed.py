"""Timing models in turns, so that other work on the machine slows all models alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from eigenslice._version import __version__
from eigenslice.checkpoint.loading import load_model
from eigenslice.errors import OptionsError
from eigenslice.evaluation.costs import bytes_per_step, operations, peak_memory, weight_bytes_on_disk
from eigenslice.options.benchmark import BenchOptions
from eigenslice.runtime.device import give_memory_back, resolve_device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Generation:
    """One timed generation.

    Attributes:
        first: Seconds to the first token: the prompt is read, and the next token is chosen.
        rest: Seconds for the other tokens.
        tokens: The generated tokens, (B, new).
        step_bytes: Bytes that a decoding step has to read, in the middle of the generation. The cache itself would
            take its memory for as long as the times are kept.
    """

    first: float
    rest: float
    tokens: Tensor
    step_bytes: int


class Runner:
    """A loaded model, ready to generate greedily."""

    def __init__(self, name: str, options: BenchOptions) -> None:
        loaded = load_model(name, options.device, options.dtype, options.trust_remote_code)
        self.model, self._options = loaded.model, options
        self.device = self.model.device
        self._forward = torch.compile(self.model.forward) if options.compile else self.model.forward

    def cache(self) -> Any:
        """An empty cache."""
        if self._options.static:
            length = self._options.prompt + self._options.new
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config)

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """The most likely next token, (B, 1), after ids (B, T)."""
        output = self._forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def generate(self, prompt: Tensor) -> Generation:
        """Generate after a prompt (B, T), and time it."""
        cache = self.cache()
        times = [self._now()]
        tokens = [self.step(prompt, cache)]
        times.append(self._now())
        for _ in range(self._options.new - 1):
            tokens.append(self.step(tokens[-1], cache))
        times.append(self._now())
        first, rest = times[1] - times[0], times[2] - times[1]
        return Generation(first, rest, torch.cat(tokens, dim=1), self._step_bytes(cache))

    def _step_bytes(self, cache: Any) -> int:
        options = self._options
        length = options.prompt + options.new if options.static else options.prompt + options.new - 1
        middle = length if options.static else options.prompt + options.new / 2
        return bytes_per_step(self.model, cache, middle, length)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def bench(
    models: list[str], options: BenchOptions, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Time models side by side; every value is JSON.

    Args:
        models: Folders, hub ids or .gguf files; all are loaded at once. The first one is the base of comparisons.
        options: The options of the command.
        progress: Called as the work goes on.

    Returns:
        `settings`, `environment` and `models`. Each model has `parameters`, `disk_bytes`, `peak_bytes`, `operations` of
        reading a prompt and `step_bytes` of generating a token. It also has `first_token` (seconds), `prefill` and
        `decode` (tokens per second, all sequences together), each with `median`, `low`, `high` and `runs`. Models after
        the first have `speedup` for `prefill` and `decode`: `measured` is the median over rounds of the first model's
        time over this model's time. `ideal` is the speed-up that operations or bytes would allow. `share` is the
        reached share of this gain.

    Raises:
        OptionsError: sequences are longer than a model takes.
        CheckpointError: a model can't be loaded.
    """
    device = resolve_device(options.device)
    rows, dtypes = _timed(models, options, device, progress)
    if options.memory:
        if options.compile:
            torch.compiler.reset()  # what was compiled refers to the models
        give_memory_back(device)
        for number, row in enumerate(rows):
            progress("memory", number, len(rows))
            row["peak_bytes"] = _peak(row["model"], options, device)
    environment = {
        "eigenslice": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "dtypes": dtypes,
    }
    return {"settings": options.model_dump(mode="json"), "environment": environment, "models": rows}


def _timed(
    models: list[str], options: BenchOptions, device: torch.device, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Load and time models, and return their rows and dtypes; nothing else stays in memory."""
    runners: list[Runner] = []
    for number, name in enumerate(models):
        progress("loading", number, len(models))
        runners.append(Runner(name, options))
        _check_length(name, runners[-1], options)
    vocabulary = min(r.model.config.get_text_config().vocab_size for r in runners)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(0, vocabulary, (options.batch, options.prompt), generator=generator).to(device)
    rounds = _time_rounds(runners, prompt, options.runs + 1, progress)
    rows = [
        {"model": name, "parameters": runner.model.num_parameters(), "disk_bytes": weight_bytes_on_disk(name)}
        | {"operations": _operations(runner, prompt), "step_bytes": rounds[0][number].step_bytes, "peak_bytes": None}
        | _speed([of_round[number] for of_round in rounds[1:]], options)
        for number, (name, runner) in enumerate(zip(models, runners, strict=True))
    ]
    for number, row in enumerate(rows[1:], 1):
        row["speedup"] = _speedup(rows[0], row, [(of_round[0], of_round[number]) for of_round in rounds[1:]])
    return rows, [str(runner.model.dtype).removeprefix("torch.") for runner in runners]


def _time_rounds(runners: list[Runner], prompt: Tensor, count: int, progress: Progress) -> list[list[Generation]]:
    """Time all models in turns; the first round warms up."""
    rounds: list[list[Generation]] = []
    total = len(runners) * count
    for round_number in range(count):
        generations = []
        for number, runner in enumerate(runners):
            progress("timing", round_number * len(runners) + number, total)
            generations.append(runner.generate(prompt))
        rounds.append(generations)
    progress("timing", total, total)
    return rounds


def _check_length(name: str, runner: Runner, options: BenchOptions) -> None:
    longest = getattr(runner.model.config.get_text_config(), "max_position_embeddings", None)
    if longest and options.prompt + options.new > longest:
        raise OptionsError(
            f"--prompt {options.prompt} --new {options.new}: {name} takes {longest} tokens",
            allowed=f"at most {longest} together",
            next_step="lower one of them",
        )


def _operations(runner: Runner, prompt: Tensor) -> int:
    """Return the operations of reading a prompt."""
    cache = DynamicCache(config=runner.model.config)
    return operations(lambda: runner.model(input_ids=prompt, past_key_values=cache, logits_to_keep=1))


def _speed(generations: list[Generation], options: BenchOptions) -> dict[str, Any]:
    read, written = options.batch * options.prompt, options.batch * (options.new - 1)
    return {
        "first_token": _spread([g.first for g in generations]),
        "prefill": _spread([read / g.first for g in generations]),
        "decode": _spread([written / g.rest for g in generations]),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "runs": values}


def _speedup(
    dense: dict[str, Any], row: dict[str, Any], pairs: list[tuple[Generation, Generation]]
) -> dict[str, dict[str, float | None]]:
    """Pairs: generations of both models in the same round."""
    times = {"prefill": [a.first / b.first for a, b in pairs], "decode": [a.rest / b.rest for a, b in pairs]}
    costs = {"prefill": "operations", "decode": "step_bytes"}
    result: dict[str, dict[str, float | None]] = {}
    for phase, ratios in times.items():
        measured, ideal = statistics.median(ratios), dense[costs[phase]] / row[costs[phase]]
        share = (measured - 1) / (ideal - 1) if ideal > 1 else None
        result[phase] = {"measured": measured, "ideal": ideal, "share": share}
    return result


def generate_once(name: str, options: BenchOptions) -> None:
    """Load a model and generate, for the memory that this takes."""
    runner = Runner(name, options.model_copy(update={"compile": False}))
    runner.generate(torch.zeros((options.batch, options.prompt), dtype=torch.long, device=runner.device))


def _peak(name: str, options: BenchOptions, device: torch.device) -> int:
    """Peak memory in bytes: torch's allocations on a GPU, the resident memory of a process on CPU."""
    if device.type != "cuda":
        return peak_memory(generate_once, name, options)
    torch.cuda.reset_peak_memory_stats(device)
    generate_once(name, options)
    peak = torch.cuda.max_memory_allocated(device)
    give_memory_back(device)
    return peak
