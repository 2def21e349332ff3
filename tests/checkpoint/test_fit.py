"""Whether a checkpoint's tensors are those of its config, and what they are called."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.weights import SINGLE
from eigenslice.errors import CheckpointError, UnsupportedModelError
from eigenslice.model.dense import DenseModel
from eigenslice.model.folding import FoldedBlock
from tests import tiny
from tests.checkpoint.files import Tensors, copy_of, edit_json, rewrite, tensors_of, weight_of
from tests.messages import check_message
from tests.results import load

QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Copier = Callable[[str], Path]


@pytest.fixture
def copied(dense_folder: Callable[[str], Path], tmp_path: Path) -> Copier:
    """Gives a copy of a case's folder, to change."""
    return lambda case: copy_of(dense_folder(case), tmp_path / case)


def opened(folder: Path) -> DenseModel:
    return DenseModel(open_source(str(folder)))


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    return caught.value


def check_weights(folder: Path, model: Any) -> None:
    """Every tensor of transformers' model is found under its name, and no other."""
    dense, state = opened(folder), model.state_dict()
    head = {f"{dense.table.lm_head}.weight"} if dense.anatomy.tied else set()
    assert set(dense.anatomy.shapes) == set(state) - head
    for name, tensor in state.items():
        assert torch.equal(weight_of(dense, name), tensor.double()), name


@pytest.mark.parametrize("case", tiny.CASES)
def test_a_saved_model_has_the_weights_of_the_model(case: str, dense_folder: Callable[[str], Path]) -> None:
    check_weights(dense_folder(case), tiny.CASES[case].build())


def test_a_sharded_model_has_the_weights_of_the_model(tmp_path: Path) -> None:
    model = tiny.CASES["llama"].build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_weights(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_stored_one(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = opened(tiny.save(tiny.CASES["llama"].build(dtype), tmp_path))
    assert dense.dtype == dtype
    assert weight_of(dense, QUERY).dtype == torch.float64


def test_parameters_are_counted_as_stored(dense_folder: Callable[[str], Path]) -> None:
    for case in ("llama", "llama-tied", "opt", "phi"):
        folder = dense_folder(case)
        assert opened(folder).anatomy.parameters == sum(t.numel() for t in tensors_of(folder).values())


def test_a_weight_of_another_shape_is_named_with_both_shapes(copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.update({QUERY: torch.zeros(32, 31)}))
    check_message(refused(folder), QUERY, "(32, 31)", "(32, 32)")


def test_a_config_of_another_width_is_found_out(copied: Copier) -> None:
    folder = copied("llama")
    edit_json(folder / "config.json", intermediate_size=48)
    check_message(refused(folder), "the config says", "48", "56")


def test_missing_weights_are_named(copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.pop(QUERY))
    check_message(refused(folder), "lacks 1 tensors", QUERY)


def test_a_missing_block_is_found_out(copied: Copier) -> None:
    folder = copied("llama")
    edit_json(folder / "config.json", num_hidden_layers=4)
    check_message(refused(folder), "the config says 4 layers, the tensors are those of 3")


def test_unknown_weights_are_named(copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.update({"lora_A.weight": torch.zeros(2, 2)}))
    error = refused(folder)
    check_message(error, "has 1 unknown ones", "lora_A.weight")
    assert "lacks" not in error.found
    assert "adapters" in error.next_step


def test_a_surplus_block_is_found_out(copied: Copier) -> None:
    folder = copied("llama")
    edit_json(folder / "config.json", num_hidden_layers=2)
    check_message(refused(folder), "has 9 unknown ones", "model.layers.2.")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.update({QUERY: t[QUERY].to(dtype)}))
    check_message(refused(folder), QUERY, "integers or 8-bit floats")


def test_buffers_that_older_versions_stored_are_no_weights(copied: Copier) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attention.masked_bias"]
    names += ["model.embed_positions.weights", "h.0.attn.bias", "h.0.attn.causal_mask"]
    folder = rewrite(copied("llama"), lambda t: t.update({name: torch.zeros(4) for name in names}))
    check_weights(folder, tiny.CASES["llama"].build())


@pytest.mark.parametrize(
    ("values", "case"),
    [({"hidden_act": "nonsense"}, "llama"), ({"activation_function": "nonsense"}, "opt")],
    ids=["llama", "opt"],
)
def test_an_activation_function_that_transformers_lacks_is_refused(
    values: dict[str, str], case: str, copied: Copier
) -> None:
    folder = copied(case)
    edit_json(folder / "config.json", **values)
    check_message(refused(folder), "nonsense")


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    """The tensors with another start of their names."""
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}


def test_gpt_neox_may_call_its_head_embed_out(copied: Copier) -> None:
    folder = copied("gpt_neox")
    tensors = renamed(tensors_of(folder), "lm_head", "embed_out")
    assert "embed_out.weight" in tensors
    assert "lm_head.weight" not in tensors
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    check_weights(folder, tiny.CASES["gpt_neox"].build())


@pytest.mark.parametrize("new", ["", "decoder."], ids=["from-the-decoder-on", "decoder-alone"])
def test_opt_checkpoints_come_with_and_without_the_models_prefix(new: str, copied: Copier) -> None:
    """facebook's own were saved from the base model: decoder.layers..., not model.decoder.layers..."""
    folder = copied("opt")
    old = "model." if not new else "model.decoder."
    tensors = renamed(tensors_of(folder), old, new)
    assert "decoder.layers.0.fc1.weight" in tensors
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    check_weights(folder, load(folder))
    check_weights(folder, tiny.CASES["opt"].build())


def test_a_base_models_checkpoint_with_a_head_loads(copied: Copier) -> None:
    folder = copied("llama")
    tensors = renamed(tensors_of(folder), "model.", "")
    assert "layers.0.mlp.up_proj.weight" in tensors
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    check_weights(folder, tiny.CASES["llama"].build())


def shares_one_matrix(folder: Path) -> bool:
    """What transformers makes of it."""
    model = load(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding.weight.data_ptr() == head.weight.data_ptr()


TIED = ["llama-tied", "qwen2-tied", "opt", "phi-tied", "gpt_neox-tied"]


def ends(folder: Path) -> tuple[str, str]:
    """Names of embedding and head."""
    table = opened(folder).table
    return f"{table.embeddings[0]}.weight", f"{table.lm_head}.weight"


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_stored_once_is_tied(case: str, dense_folder: Callable[[str], Path]) -> None:
    folder = dense_folder(case)
    assert ends(folder)[1] not in tensors_of(folder)
    assert shares_one_matrix(folder)
    dense = opened(folder)
    assert dense.anatomy.tied
    assert ends(folder)[1] not in dense.anatomy.shapes


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_that_stores_its_matrix_twice_is_tied(case: str, copied: Copier) -> None:
    folder = copied(case)
    embedding, head = ends(folder)
    rewrite(folder, lambda t: t.update({head: t[embedding].clone()}))
    assert shares_one_matrix(folder)
    dense = opened(folder)
    assert dense.anatomy.tied
    assert dense.anatomy.parameters == sum(t.numel() for t in tensors_of(folder).values()) - 96 * tiny.WIDTH


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_that_stores_two_different_matrices_is_untied(case: str, copied: Copier) -> None:
    folder = copied(case)
    embedding, head = ends(folder)
    rewrite(folder, lambda t: t.update({head: -t[embedding]}))
    assert not shares_one_matrix(folder)
    dense = opened(folder)
    assert not dense.anatomy.tied
    assert torch.equal(weight_of(dense, head), -weight_of(dense, embedding))
    assert dense.anatomy.shapes[head] == (96, tiny.WIDTH)


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_may_store_its_head_only(case: str, copied: Copier) -> None:
    folder = copied(case)
    embedding, head = ends(folder)
    rewrite(folder, lambda t: t.update({head: t.pop(embedding)}))
    dense = opened(folder)
    assert dense.anatomy.tied
    assert torch.equal(weight_of(dense, embedding), tiny.CASES[case].build().state_dict()[embedding].double())


def test_an_untied_model_with_equal_matrices_stays_untied(copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert not opened(folder).anatomy.tied


def test_an_untied_model_without_head_is_refused(copied: Copier) -> None:
    folder = rewrite(copied("llama"), lambda t: t.pop("lm_head.weight"))
    check_message(refused(folder), "lacks 1 tensors", "lm_head.weight")


def test_a_parameter_that_the_table_does_not_know_is_refused(dense_folder: Callable[[str], Path]) -> None:
    dense = DenseModel(open_source(str(dense_folder("qwen3"))))
    forgetful = replace(dense.table, attention=replace(dense.table.attention, inner=("self_attn.q_norm",)))
    table = replace(forgetful, mlp=replace(forgetful.mlp, readers=(), writers=()))
    block = {name: tensor for name, tensor in dense.read_block(0).items() if "mlp" not in name}
    with pytest.raises(UnsupportedModelError) as caught:
        FoldedBlock(table, block.keys(), block.__getitem__, torch.device("cpu"))
    check_message(caught.value, "self_attn.k_norm.weight")
