"""The run of `make demo`: slice a real model, and compare size and perplexity.

Each step is a command of eigenslice, printed before it runs. Calibration text is the reference of the Python language.
The perplexity is measured on other text, the docstrings of Python's standard library.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT = ["--calibration", "builtin", "--samples", "16", "--seqlen", "512"]
"""Little text, so that the demo takes minutes. Real runs take ten times as much or more."""


def run(*arguments: object) -> None:
    """Run a command of eigenslice, and show it and its progress.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ eigenslice {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "eigenslice", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a hub id or a .gguf file")
    parser.add_argument("--keep", type=float, default=0.85, help="share of the parameters to keep")
    arguments = parser.parse_args()
    model, sliced = arguments.model, Path(tempfile.mkdtemp(prefix="eigenslice-demo-")) / "sliced"
    run("slice", model, "-o", sliced, "--keep", arguments.keep, "--effort", "fast", *TEXT)
    run("eval", model, sliced, "--data", "builtin", "--samples", 8, "--seqlen", 512)
    manifest = json.loads((sliced / "eigenslice.json").read_text(encoding="utf-8"))
    print(
        f"\nThe result is an ordinary {manifest['model_type']} checkpoint with {manifest['plan']['neurons']} of "
        f"{manifest['dense_neurons']} neurons in each MLP:\n  {sliced}\n"
        "More calibration text and the default effort lose less; --heal trains afterwards (README.md)."
    )


if __name__ == "__main__":
    main()
