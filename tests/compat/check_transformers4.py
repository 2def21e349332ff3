"""Stock results give the same logits in transformers 4.57, with their tokenizer and rotary base.

Run by `make compat` with the interpreter of an environment that has transformers 4.57 and no eigenslice:
    python tests/compat/check_transformers4.py .venv-transformers4/bin/python
"""

import subprocess
import sys
import tempfile
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
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(sys.argv[1], return_tensors="pt")
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    torch.save({"logits": logits, "ids": inputs["input_ids"], "tokens": tokens}, folder + "/old.pt")
"""
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = []
        data = CalibrationOptions(data=str(tiny.calibration_file(Path(root))))
        for name, case in tiny.CORE.items():
            if case.stock is None:
                continue
            for kind, rope in (("", ROPE), ("-scaled", SCALED)):
                if kind and name != "llama":
                    continue
                if case.model_type == "phi":
                    rope = {"rope_parameters": rope["rope_parameters"] | {"partial_rotary_factor": 0.5}}
                model = tiny.tiny_model(case.model_type, case.config | case.extra | rope)
                dense = tiny.save(model, Path(root) / f"{name}{kind}-dense")
                tiny.save_tokenizer(dense)
                output = Path(root) / f"{name}{kind}"
                width = 22 if name == "qwen3" else 24
                slice_model(SliceOptions(model=str(dense), output=output, width=width, calibration=data))
                folders.append(output)
        subprocess.run([sys.argv[1], "-c", OLD, TEXT, *map(str, folders)], check=True)
        for folder in folders:
            old = torch.load(folder / "old.pt", weights_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
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
