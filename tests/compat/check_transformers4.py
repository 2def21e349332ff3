"""Stock results give the same logits in transformers 4.57, with their tokenizer and rotary base.

Types that hold the full width only lose neurons. Gemma 3 and OLMo 3 have rotary angles for each kind of attention.

Run by `make compat` with the interpreter of an environment that has transformers 4.57 and no eigenslice:
    python tests/compat/check_transformers4.py .venv-transformers4/bin/python
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import tiny

from eigenslice import CalibrationOptions, SliceOptions, slice_model

TEXT = "atextwithoutspaces"
OLD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4.57"), __version__
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(folder)(sys.argv[1], return_tensors="pt")
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    torch.save({"logits": logits, "ids": inputs["input_ids"], "tokens": tokens}, folder + "/old.pt")
"""
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}


def of_kinds(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters of two kinds of attention."""
    return {
        "rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": sliding["rope_parameters"]}
    }


ROPES = {
    "phi": {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    "gemma3_text": of_kinds(SCALED, ROPE),
    "olmo3": of_kinds(ROPE, ROPE),
}
"""Rotary parameters by type, where they aren't `ROPE`."""
WHOLE = ("gpt2", "opt", "falcon", "gpt_neo", "gptj", "xglm", "mpt", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3")
"""Cases of types that are stock at full width only."""


def runs() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Names, dense models and sizes."""
    for name, case in tiny.CORE.items():
        if case.stock is None:
            continue
        size: dict[str, Any] = {"width": 22 if name == "qwen3" else 24}
        for kind, rope in (("", ROPE), *([("-scaled", SCALED)] if name == "llama" else [])):
            rope = ROPES.get(case.model_type, rope)
            yield name + kind, tiny.tiny_model(case.model_type, case.config | case.extra | rope), size
    for name in WHOLE:
        case = tiny.CASES[name]
        rope = ROPES.get(name, ROPE if name in tiny.POST_NORMS else {})
        size = {"width": tiny.WIDTH} | ({} if name == "mpt" else {"neurons": 40})
        yield name, tiny.tiny_model(case.model_type, case.config | case.extra | rope), size


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = []
        data = CalibrationOptions(data=str(tiny.calibration_file(Path(root))))
        for name, model, size in runs():
            dense = tiny.save(model, Path(root) / f"{name}-dense")
            tiny.save_tokenizer(dense)
            output = Path(root) / name
            slice_model(SliceOptions(model=str(dense), output=output, form="stock", calibration=data, **size))
            folders.append(output)
        subprocess.run([sys.argv[1], "-c", OLD, TEXT, *map(str, folders)], check=True)
        for folder in folders:
            old = torch.load(folder / "old.pt", weights_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
            with torch.no_grad():
                logits = model(torch.arange(3, 40)[None]).logits
            tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
            difference = float((logits - old["logits"]).abs().max() / logits.abs().max())
            assert difference < 1e-5, (folder.name, difference)
            assert torch.equal(inputs["input_ids"], old["ids"]), folder.name
            assert torch.equal(tokens, old["tokens"]), folder.name
            print(f"{folder.name}: logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
