"""The loss of a sliced model by the precision of its arithmetic, on a CPU that emulates each choice.

    python benchmarks/precision.py MODEL --calibration tinystories.json --field text --samples 32 --seqlen 256

Operands of float32 products are rounded as the hardware would round them (tests/tensor_cores.py). Everything else is
the same run: `slice --effort fast --fit-neurons`, and the loss on its held-out text. The choices are the fields of
`eigenslice.runtime.precision.Precision`. A line of JSON for each.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from eigenslice import CalibrationOptions, SliceOptions
from eigenslice.runtime.precision import EXACT, ON_BF16_CPU, ON_TENSOR_CORES, Precision
from eigenslice.slicing import slice_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.tensor_cores import TensorCores

CHOICES = {
    "float32 and float64": EXACT,
    "Gram matrices in TF32": Precision(gram="tf32"),
    "Gram matrices in bfloat16": Precision(gram="bfloat16"),
    "neurons in TF32": Precision(neurons="tf32"),
    "neurons in bfloat16": Precision(neurons="bfloat16"),
    "forward pass in bfloat16": Precision(forward="bfloat16"),
    "float32 solves": Precision(solve="float32"),
    "GPU": ON_TENSOR_CORES,
    "bfloat16 on a CPU": ON_BF16_CPU,
    "bfloat16 and float32 solves": Precision("bfloat16", "bfloat16", "bfloat16", "float32"),
}


def measure(options: SliceOptions, precision: Precision) -> dict[str, float]:
    """Slice into a temporary folder; return KL, perplexity ratio and seconds."""
    with tempfile.TemporaryDirectory() as folder, TensorCores():
        start = time.monotonic()
        result = slice_model(options.model_copy(update={"output": Path(folder) / "out"}), precision=precision)
    loss = result.manifest["loss"]
    seconds = time.monotonic() - start
    return {"kl": loss["kl"], "ratio": loss["perplexity_ratio"], "tokens": loss["tokens"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--field", action="append", default=[])
    parser.add_argument("--keep", type=float, default=0.85)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--choices", choices=CHOICES, nargs="+", default=list(CHOICES))
    given = parser.parse_args()
    data = CalibrationOptions(
        data=tuple(given.calibration), field=tuple(given.field), samples=given.samples, seqlen=given.seqlen
    )
    values = {"model": given.model, "output": "out", "keep": given.keep, "effort": "fast", "fit_neurons": True}
    options = SliceOptions.model_validate(values | {"calibration": data})
    for choice in given.choices:
        print(json.dumps({"choice": choice} | measure(options, CHOICES[choice])), flush=True)


if __name__ == "__main__":
    main()
