"""What a GPU does: the same results as the CPU, time by stage, peak memory. Needs CUDA; sized for 10 minutes.

    python benchmarks/gpu.py -o gpu.json [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

1. Tiny models of several kinds are sliced and evaluated on the GPU and on the CPU; losses have to agree to 5 %.
2. A random Llama of 1.1 B parameters in bfloat16 is sliced on 64 x 1024 random tokens.
3. SmolLM2, if its file is given, is sliced on the GPU and on the CPU, on the same text, and both are evaluated.

Nothing is downloaded. `benchmarks/gpu.sh` makes an environment first.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eigenslice import CalibrationOptions, SliceOptions, __version__
from eigenslice.evaluation.perplexity import evaluate
from eigenslice.slicing import slice_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import tiny

TOLERANCE = 0.05
"""Largest difference of a perplexity between GPU and CPU, as a share: TF32 and float32 against float64."""
KINDS = ("llama", "opt", "mixtral", "gemma2")
TINY = {"width": 24, "neurons": 40}
LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
"""The shape of TinyLlama, 1.1 B parameters."""


class Stages:
    """A progress that measures the seconds of each stage, until the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "opening", time.monotonic()

    def __call__(self, stage: str, done: int, total: int, tokens: int = 0) -> None:
        if stage != self._stage:
            self.end()
            self._stage = stage

    def end(self) -> None:
        """Close the last stage."""
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


def sliced(
    model: Path | str, device: str, output: Path, calibration: CalibrationOptions, **size: Any
) -> dict[str, Any]:
    """Slice on a device; return time by stage, peak memory of the device, the precision and the loss."""
    stages = Stages()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    options = {"model": str(model), "output": output, "device": device, "calibration": calibration} | size
    manifest = slice_model(SliceOptions.model_validate(options), stages).manifest
    stages.end()
    return {
        "device": device,
        "seconds": {stage: round(seconds, 2) for stage, seconds in stages.seconds.items()},
        "total_seconds": round(sum(stages.seconds.values()), 2),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "precision": manifest["precision"],
        "loss": manifest["loss"],
    }


def compared(model: Path | str, folder: Path, calibration: CalibrationOptions, **size: Any) -> dict[str, Any]:
    """Slice on the GPU and on the CPU, and evaluate each result where it was made."""
    rows = {}
    for device in ("cuda", "cpu"):
        output = folder / f"{Path(model).name}-{device}"
        rows[device] = sliced(model, device, output, calibration, **size)
        rows[device]["perplexity"] = evaluate(str(output), calibration, device, "float32").perplexity
    difference = rows["cuda"]["perplexity"] / rows["cpu"]["perplexity"] - 1
    return rows | {"difference": difference, "agrees": abs(difference) < TOLERANCE}


def random_ids(path: Path, vocabulary: int, samples: int, length: int) -> CalibrationOptions:
    """Random tokens in a file, as calibration."""
    ids = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": ids}, path)
    return CalibrationOptions(data=str(path))


def large_model(folder: Path) -> Path:
    """A random Llama of 1.1 B parameters in bfloat16."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LARGE, dtype=torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def report(folder: Path, smollm2: Path | None, is_large: bool = True) -> dict[str, Any]:
    """Run all parts, and print each when it is done."""
    result: dict[str, Any] = {
        "eigenslice": __version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0),
        "tiny": {},
    }
    calibration = CalibrationOptions(data=str(tiny.calibration_file(folder, 40, 32)))
    for kind in KINDS:
        model = tiny.save(tiny.CASES[kind].build(), folder / kind)
        result["tiny"][kind] = compared(model, folder, calibration, **TINY)
        print(f"{kind}: perplexity {100 * result['tiny'][kind]['difference']:+.2f} % of the CPU's", flush=True)
    if is_large:
        ids = random_ids(folder / "ids.safetensors", LARGE["vocab_size"], 64, 1024)
        result["1.1B"] = sliced(large_model(folder / "large"), "cuda", folder / "large-sliced", ids, keep=0.75)
        print(json.dumps({"1.1B": result["1.1B"]}), flush=True)
    if smollm2:
        text = CalibrationOptions(data="builtin", samples=16, seqlen=512)
        result["smollm2"] = compared(smollm2, folder, text, keep=0.85, effort="fast")
        print(json.dumps({"smollm2": result["smollm2"]}), flush=True)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2's GGUF or folder")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device: nothing was measured")
    with tempfile.TemporaryDirectory(prefix="eigenslice-gpu-") as folder:
        result = report(Path(folder), given.smollm2)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    wrong = [kind for kind, row in result["tiny"].items() if not row["agrees"]]
    wrong += ["smollm2"] if "smollm2" in result and not result["smollm2"]["agrees"] else []
    if wrong:
        raise SystemExit(f"GPU and CPU disagree by more than {100 * TOLERANCE:.0f} %: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
