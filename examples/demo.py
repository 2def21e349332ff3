"""What `make demo` runs: slice a real model, compare size and perplexity, let both write a sentence."""

import argparse
import tempfile
import time
from pathlib import Path

from eigenslice import CalibrationOptions, SliceOptions, perplexity, slice_model
from eigenslice.checkpoint.loading import LoadedModel, load_model
from eigenslice.data import evaluation_tokens

PROMPT = "The most important thing about a good library is"


def sentence(loaded: LoadedModel) -> str:
    """The most likely continuation of the prompt."""
    tokenizer = loaded.tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = loaded.model.generate(**inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, a hub id or a .gguf file")
    parser.add_argument("--keep", type=float, default=0.85, help="share of the parameters to keep")
    arguments = parser.parse_args()

    output = Path(tempfile.mkdtemp(prefix="eigenslice-demo-")) / "sliced"
    calibration = CalibrationOptions(data="builtin", samples=8, seqlen=1024)
    print(f"$ eigenslice slice {arguments.model} -o {output} --keep {arguments.keep} --calibration builtin")
    start = time.perf_counter()
    result = slice_model(
        SliceOptions(model=arguments.model, output=output, keep=arguments.keep, calibration=calibration)
    )
    print(f"  sliced in {time.perf_counter() - start:.0f} s, calibrated on the Python language reference")

    # evaluated on other text: the docstrings of Python's standard library
    held_out = CalibrationOptions(data="builtin", samples=8, seqlen=1024)
    rows = []
    for name in (arguments.model, str(output)):
        loaded = load_model(name)
        tokens = evaluation_tokens(held_out, loaded.tokenizer, loaded.model.config)
        rows.append((loaded.model.num_parameters(), perplexity(loaded.model, tokens.batches), sentence(loaded)))
    manifest = result.manifest
    for label, (parameters, measured, text) in zip(("dense", "sliced"), rows, strict=True):
        print(f"\n{label}: {parameters / 1e6:.1f} M parameters ({100 * parameters / rows[0][0]:.1f} %)")
        print(f"  perplexity {measured.perplexity:.2f} on {measured.tokens} tokens of Python docstrings")
        print(f"  {text!r}")
    print(
        f"\nThe result is an ordinary {manifest['model_type']} checkpoint "
        f"({manifest['site_widths'][0]} instead of {manifest['dense_width']} wide, "
        f"{manifest['plan']['neurons']} instead of {manifest['dense_neurons']} neurons in each MLP):\n  {output}"
    )


if __name__ == "__main__":
    main()
