"""Cells of docs/support.md that need another program: each runs a folder there and compares it with transformers."""

import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tests import tiny
from tests.compat import check_vllm
from tests.export import models
from tests.results import load

from eigenslice import ExportOptions, export_model
from eigenslice.errors import UnsupportedModelError, first_line
from eigenslice.export.gguf.arch import ARCHITECTURES
from eigenslice.export.openvino import OpenVino

NOT_RUN, NOT_WRITTEN = "not run", "not written"
MODULES = {"llama.cpp": "xllamacpp", "openvino": "openvino"}
"""What a column imports."""
IDS = tiny.random_ids(2, 20, seed=5)
OLD = """
import sys, torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.startswith("4.57"), __version__
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.save(model(ids).logits, folder + "/old.pt")
    except Exception as error:
        open(folder + "/old.txt", "w").write(type(error).__name__ + ": " + str(error).strip())
"""
"""Runs in transformers 4.57: logits, or what went wrong, of some folders."""


def logits(folder: Path, ids: torch.Tensor = IDS, **kwargs: torch.Tensor) -> torch.Tensor:
    """What transformers computes."""
    with torch.no_grad():
        return load(folder)(ids, **kwargs).logits


def near(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """A cell for logits that should be within 1e-4 of the largest one."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    return "yes" if error <= 1e-4 else f"no: off by {error:.1e}"


def failure(words: str) -> str:
    """A cell with the beginning of a message, without addresses, which differ in each run."""
    return "no: " + re.sub(r" at 0x[0-9a-f]+", "", " ".join(words.split()))[:160]


def attempt(check: Callable[[], str]) -> str:
    """A check's cell, or one with what it raised."""
    try:
        return check()
    except Exception as error:  # whatever a model raises is the cell's content
        return failure(first_line(error))


def both(check: Callable[[Path], str], sliced: Path, dense: Path) -> str:
    """The sliced model's cell; where it fails, whether the dense model fails, too."""
    cell = attempt(lambda: check(sliced))
    also = cell.startswith("no: ") and attempt(lambda: check(dense)).startswith("no: ")
    return cell + (" (and so does the dense model)" if also else "")


def missing(column: str) -> bool:
    """Whether a column's module isn't installed."""
    return column in MODULES and find_spec(MODULES[column]) is None


def check_openvino(folder: Path) -> str:
    """A row of tokens at once, and another one token by token."""
    output = folder.with_name(f"{folder.name}-openvino")
    try:
        export_model(ExportOptions(model=str(folder), output=output, to="openvino", check=False))
    except UnsupportedModelError as error:
        return f"{NOT_WRITTEN}: {error.found}"
    runtime = OpenVino(output)
    whole, steps = IDS.tolist()
    calls = [whole, *(steps[: i + 1] for i in range(len(steps)))]
    actual = torch.cat([torch.tensor(np.array(runtime.logits(ids))) for ids in calls])
    return near(actual, logits(folder).flatten(0, 1))


def check_llama_cpp(folder: Path) -> str:
    """All tokens' log-probabilities after each prefix."""
    output = folder.with_name(f"{folder.name}.gguf")
    try:
        export_model(ExportOptions(model=str(folder), output=output, to="gguf", type="f32", check=False))
    except UnsupportedModelError as error:
        variant = load(folder).config.model_type in ARCHITECTURES
        return NOT_WRITTEN + (f": {error.found}" if variant else "")
    ids = IDS[:1]
    return near(models.log_probabilities(output, ids[0].tolist()), logits(folder, ids)[0].log_softmax(-1))


def check_vllm_with(python: str) -> Callable[[Path], str]:
    """The check of vLLM in its own environment: all tokens' log-probabilities after each prefix."""

    def check(folder: Path) -> str:
        try:
            error = float(check_vllm.log_probability_differences(python, folder).max())
        except RuntimeError as refusal:
            return failure(str(refusal))
        except subprocess.TimeoutExpired:  # a busy machine says nothing about the model
            return NOT_RUN
        return "yes" if error < check_vllm.TOLERANCE else f"no: off by {error:.1e}"

    return check


def check_old_with(python: str) -> Callable[[Path], str]:
    """The check of transformers 4.57 in its own environment: logits."""

    def check(folder: Path) -> str:
        ids = folder / "ids.pt"
        torch.save(IDS, ids)
        subprocess.run([python, "-c", OLD, ids, folder], check=True, capture_output=True)
        if not (folder / "old.txt").is_file():
            return near(torch.load(folder / "old.pt", weights_only=True), logits(folder))
        text = (folder / "old.txt").read_text()
        return "no such type" if "does not recognize this architecture" in text else failure(text)

    return check
