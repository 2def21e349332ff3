"""The custom class behaves like a model of transformers: generation, padding, checkpointing, saving, bf16."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eigenslice.modeling import MODELING_FILE
from tests import tiny
from tests.conftest import Slicer
from tests.results import load

# every kind of result: stock and custom, with shortcuts, LayerNorm tied and untied, parallel and sequential
RESULTS = [
    pytest.param("llama", {}, id="llama-stock"),
    pytest.param("qwen2-tied", {}, id="qwen2-stock-tied"),
    pytest.param("phi", {}, id="phi-stock"),
    pytest.param("mistral-window", {"basis": "per-block"}, id="mistral-window-per-block"),
    pytest.param("qwen3", {"form": "custom"}, id="qwen3-custom"),
    pytest.param("opt", {}, id="opt-custom-tied"),
    pytest.param("opt", {"basis": "per-block"}, id="opt-per-block"),
    pytest.param("phi", {"basis": "per-block"}, id="phi-per-block"),
    pytest.param("gpt_neox", {}, id="gpt_neox-custom"),
    pytest.param("gpt_neox-sequential", {"basis": "per-block"}, id="gpt_neox-sequential-per-block"),
    pytest.param("llama", {"neurons": 40, "form": "custom"}, id="llama-custom-neurons"),
    pytest.param("opt", {"neurons": 40}, id="opt-custom-neurons"),
    pytest.param("gpt2", {"neurons": 40}, id="gpt2-custom-neurons"),
    pytest.param("bloom", {}, id="bloom-custom"),
    pytest.param("gemma2", {"basis": "per-block"}, id="gemma2-per-block"),
    pytest.param("olmo2", {}, id="olmo2-custom"),
    pytest.param("mixtral", {"basis": "per-block"}, id="mixtral-per-block"),
    pytest.param("qwen3_next", {"form": "custom"}, id="qwen3_next-custom"),
]
CUSTOM = [parameters for parameters in RESULTS if "stock" not in str(parameters.id)]


@pytest.mark.parametrize(("case", "options"), RESULTS)
def test_greedy_generation_with_cache_without_cache_and_padded_agree(
    case: str, options: dict, run_slice: Slicer
) -> None:
    model = load(run_slice(case, width=24, **options).output)
    long, short = tiny.random_ids(1, 12, seed=7), tiny.random_ids(1, 7, seed=8)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}

    def generate(ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: bool) -> torch.Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(ids, attention_mask=mask, **settings, **kwargs)[:, ids.shape[1] :]

    alone = [generate(ids) for ids in (long, short)]
    for ids, tokens in zip((long, short), alone, strict=True):
        assert torch.equal(generate(ids, use_cache=False), tokens)
    padding = long.shape[1] - short.shape[1]
    batch = torch.cat([long, torch.nn.functional.pad(short, (padding, 0))])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    assert torch.equal(generate(batch, mask), torch.cat(alone))


@pytest.mark.parametrize(("case", "options"), CUSTOM)
def test_gradient_checkpointing_gives_the_same_gradients(case: str, options: dict, run_slice: Slicer) -> None:
    model = load(run_slice(case, width=24, **options).output)
    ids = tiny.random_ids(2, 10)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.train()
    model.activation_checkpointing_enable()
    calls = []
    layer = model.get_submodule("model." + model.config.architecture["layers"])[0]
    first = layer.sites[0][0]
    layer.get_submodule(first["norm"] or first["modules"][0]).register_forward_hook(lambda *_: calls.append(1))
    for checkpointed, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)
    assert len(calls) == 2  # once forward, once again backward


@pytest.mark.parametrize(("case", "options"), CUSTOM)
def test_bfloat16_stays_near_float32(case: str, options: dict, run_slice: Slicer) -> None:
    output = run_slice(case, width=24, **options).output
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        exact = load(output)(ids).logits
        rounded = load(output, dtype=torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("case", "options"), CUSTOM)
def test_saving_and_loading_again_keeps_the_model(case: str, options: dict, run_slice: Slicer, tmp_path: Path) -> None:
    model = load(run_slice(case, width=24, **options).output)
    model.save_pretrained(tmp_path / "again")
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_hidden_states_and_attentions_are_recorded(run_slice: Slicer) -> None:
    model = load(run_slice("opt", width=24, basis="per-block").output, attn_implementation="eager")
    output = model(tiny.random_ids(1, 8), output_hidden_states=True, output_attentions=True)
    assert [h.shape[-1] for h in output.hidden_states] == [24, 24, 24, tiny.WIDTH]
    assert len(output.attentions) == 3


def test_attention_implementation_reaches_the_blocks(run_slice: Slicer) -> None:
    output = run_slice("gpt_neox", width=24).output
    for name in ("eager", "sdpa"):
        model = load(output, attn_implementation=name)
        assert model.model.gpt_neox.layers[0].attention.config._attn_implementation == name


SCRIPT = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "eigenslice":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
ids, results = torch.arange(3, 15)[None], {}
for folder, trust in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    results[folder] = {"logits": logits, "tokens": tokens}
torch.save(results, sys.argv[2])
assert "eigenslice" not in sys.modules
"""


def test_results_load_where_eigenslice_is_not_installed(
    run_slice: Slicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    outputs = {case: run_slice(case, width=24).output for case in ("llama", "qwen2", "phi", "opt", "gpt_neox")}
    trust = json.dumps({str(output): case in ("opt", "gpt_neox") for case, output in outputs.items()})
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, trust, out], check=True, capture_output=True)
    elsewhere = torch.load(out, weights_only=True)
    for case, output in outputs.items():
        model, ids = load(output), torch.arange(3, 15)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, elsewhere[str(output)]["logits"]), case
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        assert torch.equal(tokens, elsewhere[str(output)]["tokens"]), case


def test_custom_folder_carries_the_modelling_file_and_stock_has_no_code(run_slice: Slicer) -> None:
    custom, stock = run_slice("opt", width=24).output, run_slice("llama", width=24).output
    assert (custom / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    assert not list(stock.glob("*.py"))
    assert "auto_map" not in json.loads((stock / "config.json").read_text())


def test_config_of_a_dense_model_is_refused(dense_folder: Callable[[str], Path]) -> None:
    from eigenslice.modeling import SlicedConfig, SlicedForCausalLM

    with pytest.raises(ValueError, match="not the config of a model that eigenslice saved"):
        SlicedForCausalLM(SlicedConfig(text_config={"model_type": "llama"} | tiny.LLAMA))
