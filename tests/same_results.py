"""SHA-256 of every file of the results of twelve runs: a change of structure must not change one of them.

    python -m tests.same_results > before.json        # in the old tree
    python -m tests.same_results --same before.json   # in the new one

The numbers differ between machines and versions of torch, so that none are kept in the repository.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from tests import processes, tiny, words

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "width, global basis, stock": ("llama", {"width": 24}),
    "per-block basis, LayerNorm": ("opt", {"width": 24, "basis": "per-block"}),
    "tied, planned": ("llama-tied", {"keep": 0.75}),
    "untied": ("llama-tied", {"width": 24, "untie": True}),
    "custom class, uneven neurons": ("llama", {"keep": 0.75, "form": "custom"}),
    "stock form, bfloat16": ("qwen2", {"slicing": 0.25, "form": "stock", "dtype": "bfloat16"}),
    "mixture": ("mixtral", {"width": 24, "neurons": 16}),
    "LayerNorm, stock": ("phi", {"width": 24, "neurons": 40}),
    "norms after sublayers": ("gemma2", {"width": 24}),
    "blocks left out, files as memory, shards": ("llama-tied", {"keep": 0.3, "offload": "disk", "shard_gib": 2e-5}),
    "own text": ("llama", {"keep": 0.8, "own_text": 1.0}),
}
RANKS = "two ranks"


def main() -> None:
    """Print the hashes, or compare them with those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama of your own, for one more run")
    parser.add_argument("--same", type=Path, help="hashes to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = arguments.model and arguments.model.absolute()
    expected = json.loads(arguments.same.read_text()) if arguments.same else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # names in manifests are relative
        found = {name: _hashes(name, case, options) for name, (case, options) in RUNS.items()}
        found["resumed"] = _resumed()
        found[RANKS] = _ranks()
        if model:
            Path("own").symlink_to(model)
            found["own model"] = _sliced("own", {"keep": 0.75}, "own-out")
    if expected is None:
        print(json.dumps(found, indent=1))
        return
    different = [
        f"{run}: {file}" for run in found for file in found[run] if found[run][file] != expected[run].get(file)
    ]
    missing = [run for run in expected if run in found and expected[run].keys() != found[run].keys()]
    print("\n".join([*different, *missing]) or f"{len(found)} runs give the same files")
    sys.exit(bool(different or missing))


def _model(case: str) -> str:
    if not Path(case).exists():
        tiny.save(tiny.CASES[case].build(), Path(case))
        words.tokenizer().save_pretrained(case)
        Path("text.txt").write_text(words.text(tiny.random_ids(1, 900)[0].tolist()))
        tiny.calibration_file(Path())
    return case


def _hashes(name: str, case: str, options: dict[str, Any]) -> dict[str, str]:
    return _sliced(_model(case), options, name.replace(" ", "-").replace(",", ""))


def _options(model: str, options: dict[str, Any], output: str) -> SliceOptions:
    texts = "own_text" in options or "keep" in options
    data = CalibrationOptions(data="text.txt" if texts else "calibration.safetensors", samples=24, seqlen=24)
    return SliceOptions(model=model, output=Path(output), calibration=data, **options)


def _sliced(model: str, options: dict[str, Any], output: str) -> dict[str, str]:
    slice_model(_options(model, options, output))
    return _files(output)


def _files(output: str) -> dict[str, str]:
    files = [path for path in sorted(Path(output).rglob("*")) if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _resumed() -> dict[str, str]:
    """A run that is interrupted in its last pass, and goes on."""
    options = _options(_model("llama"), {"width": 24, "neurons": 40}, "resumed")
    left = [11]

    def stop(*_: object, **__: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    try:
        slice_model(options, stop)
    except KeyboardInterrupt:
        slice_model(options.model_copy(update={"resume": True}))
    return _files("resumed")


def _ranks() -> dict[str, str]:
    command = ["slice", _model("llama"), "-o", "ranks", "--width", "24", "--calibration", "calibration.safetensors"]
    log = Path("log").absolute()
    for process in processes.ranks(2, *command, log=log):
        process.join(120)
        assert process.exitcode == 0, log.read_text()
    return _files("ranks")


if __name__ == "__main__":
    main()
