"""A custom result that is saved again after `import eigenslice`, copied, or sent to another process."""

import copy
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from eigenslice.modeling import AUTO_MAP, MODELING_FILE
from tests import tiny
from tests.conftest import Slicer
from tests.results import load

CASES = [("opt", {}), ("gpt_neox", {}), ("xglm", {}), ("llama", {"basis": "per-block"})]
"""Layers, a centred embedding (opt), stored positions (xglm), shortcuts."""

SCRIPT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "eigenslice":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, transformers
ids = torch.arange(3, 15)[None]
results = {}
for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        results[name] = model(ids)[0]
torch.save(results, sys.argv[1])
"""


def test_the_code_is_saved_again_and_loads_where_eigenslice_is_not_installed(
    run_slice: Slicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = run_slice("opt", width=24).output
    models: dict[str, Any] = {
        "AutoModelForCausalLM": load(folder),
        "AutoModel": AutoModel.from_pretrained(folder).eval(),
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained(folder).eval(),
    }
    arguments = []
    for name, model in models.items():
        again = tmp_path / name
        model.save_pretrained(again)
        assert (again / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
        assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
        arguments += [name, str(again)]
    # Each class of the file loads from what another one saved
    arguments += ["AutoModelForTokenClassification", str(tmp_path / "AutoModelForCausalLM")]
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, out, *arguments], check=True, capture_output=True)
    elsewhere = torch.load(out, weights_only=True)
    ids = torch.arange(3, 15)[None]
    assert elsewhere["AutoModelForTokenClassification"].shape == (1, 12, 2)
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(elsewhere[name], model(ids)[0])


@pytest.mark.parametrize(("case", "options"), CASES)
def test_pickle_and_deepcopy_give_the_same_model(case: str, options: dict, run_slice: Slicer) -> None:
    model = load(run_slice(case, width=24, **options).output)
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(again(ids).logits, expected)
            assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
            assert again.config.to_dict() == model.config.to_dict()
            tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
            assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _logits(model: Any, ids: torch.Tensor, results: Any) -> None:
    with torch.no_grad():
        results.put(model(ids).logits.tolist())


def test_a_model_reaches_a_process_that_has_not_built_one(run_slice: Slicer) -> None:
    model = load(run_slice("opt", width=24).output)
    ids = tiny.random_ids(1, 6)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_logits, args=(model, ids, results))
    process.start()
    elsewhere = torch.tensor(results.get(timeout=120))
    process.join()
    with torch.no_grad():
        torch.testing.assert_close(elsewhere, model(ids).logits)


def test_layers_of_a_model_share_one_class(run_slice: Slicer) -> None:
    """FSDP and device maps ask for the class of a layer."""
    model = load(run_slice("opt", width=24).output)
    classes = {type(layer) for layer in model.get_submodule("model." + model.config.architecture["layers"])}
    assert [kind.__name__ for kind in classes] == ["SlicedOPTDecoderLayer"]
    assert "SlicedOPTDecoderLayer" in model._no_split_modules
