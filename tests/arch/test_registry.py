"""The tables, against transformers' own models: names, shapes, and who reads and writes what."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from eigenslice.arch import TABLES, Table, lookup, table_of
from eigenslice.dense import empty_model
from eigenslice.errors import UnsupportedModelError
from tests import tiny
from tests.messages import check_message

EPS = 3e-4  # no architecture's default


def config_of(case: str) -> Any:
    """Config of a case, with an unusual epsilon wherever the table says that the config has one."""
    model_type, values = tiny.CASES[case].model_type, tiny.CASES[case].config | tiny.CASES[case].extra
    eps = TABLES[model_type].eps
    return AutoConfig.for_model(model_type, **values | ({eps: EPS} if isinstance(eps, str) else {}))


@cache
def model_of(case: str) -> Any:
    """transformers' model of a case, without memory for its weights."""
    return empty_model(config_of(case))


def layers_of(case: str) -> Any:
    return model_of(case).get_submodule(lookup(model_of(case).config).layers)


def names_of(table: Table) -> set[str]:
    """Every module that a table names in a layer."""
    both = (table.attention, table.mlp)
    return {name for s in both for name in (s.norm, *s.modules, *s.readers, *s.writers, *s.inner)}


cases = pytest.mark.parametrize("case", tiny.CORE)


def test_the_cases_cover_every_table() -> None:
    assert {case.model_type for case in tiny.CASES.values()} == set(TABLES)


def test_tables_are_found_by_their_own_model_type() -> None:
    for model_type, table in TABLES.items():
        assert table.model_type == model_type
        assert table_of(model_type) is table


@cases
def test_outer_names_exist(case: str) -> None:
    model, table = model_of(case), TABLES[tiny.CASES[case].model_type]
    assert model.get_submodule(table.embeddings[0]) is model.get_input_embeddings()
    assert model.get_submodule(table.head) is model.get_output_embeddings()
    assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in table.embeddings)
    assert len(model.get_submodule(table.layers)) == model.config.num_hidden_layers
    assert "norm" in type(model.get_submodule(table.final_norm)).__name__.lower()


@pytest.mark.parametrize("model_type", TABLES)
def test_every_name_in_a_layer_exists_in_some_variant(model_type: str) -> None:
    cases = [name for name, case in tiny.CASES.items() if case.model_type == model_type]
    present = {name for case in cases for name, _ in layers_of(case)[0].named_modules()}
    assert names_of(TABLES[model_type]) <= present


@cases
def test_every_parameter_of_a_layer_has_exactly_one_role(case: str) -> None:
    table = TABLES[tiny.CASES[case].model_type]
    both = (table.attention, table.mlp)
    norms = {s.norm for s in both}
    roles = [*norms, *(name for s in both for name in (*s.readers, *s.writers, *s.inner))]
    assert len(roles) == len(set(roles))
    for layer in layers_of(case):
        for name, _ in layer.named_parameters():
            owners = [role for role in roles if name.startswith(role + ".")]
            assert len(owners) == 1, name


@cases
def test_every_parameter_outside_of_the_layers_is_named(case: str) -> None:
    model, table = model_of(case), TABLES[tiny.CASES[case].model_type]
    outer = {*table.embeddings, table.final_norm, table.head}
    names = {name.rpartition(".")[0] for name in model.state_dict() if not name.startswith(table.layers)}
    assert names <= outer
    assert outer - {table.final_norm} <= names  # the final norm may be without parameters


@cases
def test_readers_and_writers_have_the_stream_at_their_end(case: str) -> None:
    table, width = TABLES[tiny.CASES[case].model_type], tiny.WIDTH
    for layer in layers_of(case):
        for sublayer in (table.attention, table.mlp):
            assert {layer.get_submodule(name).in_features for name in sublayer.readers} == {width}
            assert {layer.get_submodule(name).out_features for name in sublayer.writers} == {width}


@cases
def test_the_norm_is_of_the_kind_and_has_the_epsilon_that_the_table_says(case: str) -> None:
    model, table = model_of(case), TABLES[tiny.CASES[case].model_type]
    epsilon = table.epsilon(model.config)
    names = [f"{table.layers}.0.{s.norm}" for s in (table.attention, table.mlp)] + [table.final_norm]
    for norm in (model.get_submodule(name) for name in names):
        assert (table.norm == "layer") == isinstance(norm, nn.LayerNorm)
        assert epsilon == (norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon)


@cases
def test_the_dropout_is_a_field_of_the_config(case: str) -> None:
    table = TABLES[tiny.CASES[case].model_type]
    if table.dropout:
        assert isinstance(getattr(config_of(case), table.dropout), float)
    else:  # then nothing in a layer but attention weights may be dropped
        assert not any(isinstance(module, nn.Dropout) for module in layers_of(case)[0].modules())


class Record:
    """What goes into and comes out of a module when it runs, as tokens x numbers."""

    def __init__(self, module: nn.Module) -> None:
        self.input, self.output = torch.empty(0), torch.empty(0)
        module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        self.input, self.output = x.flatten(0, -2), y.flatten(0, -2)


@cases
def test_a_running_layer_does_what_the_table_says(case: str) -> None:
    """Readers get the norm's output, modules follow each other, and their last output joins the stream."""
    model = tiny.CASES[case].build()
    table = TABLES[tiny.CASES[case].model_type]
    layer = model.get_submodule(table.layers)[1]
    records = {name: Record(layer.get_submodule(name)) for name in names_of(table) if _has(layer, name)}
    records["layer"] = Record(layer)
    with torch.no_grad():
        model(tiny.random_ids(2, 7))
    stream: Tensor = records["layer"].input
    for sublayers in table.sites(model.config):
        for sublayer in sublayers:
            norm = records[sublayer.norm]
            assert torch.equal(norm.input, stream)
            assert torch.equal(records[sublayer.modules[0]].input, norm.output)
            for before, after in zip(sublayer.modules, sublayer.modules[1:], strict=False):
                assert torch.equal(records[after].input, records[before].output)
            for reader in sublayer.readers:
                assert torch.equal(records[reader].input, norm.output)
            last = records[sublayer.modules[-1]].output
            torch.testing.assert_close(sum(records[w].output for w in sublayer.writers), last)
        stream = stream + sum(records[s.modules[-1]].output for s in sublayers)
    torch.testing.assert_close(records["layer"].output, stream)


def _has(layer: nn.Module, name: str) -> bool:
    return any(name == present for present, _ in layer.named_modules())


@cases
def test_parallel_blocks_have_one_site_and_others_two(case: str) -> None:
    expected = 1 if case in ("phi", "phi-tied", "phi-qk-norm", "gpt_neox", "gpt_neox-tied") else 2
    table = TABLES[tiny.CASES[case].model_type]
    sites = table.sites(config_of(case))
    assert len(sites) == expected
    assert [s for sublayers in sites for s in sublayers] == [table.attention, table.mlp]


@pytest.mark.parametrize("model_type", TABLES)
def test_stock_forms_are_types_of_transformers_with_a_table_of_their_own(model_type: str) -> None:
    for form in TABLES[model_type].stock:
        fields = AutoConfig.for_model(form.model_type).to_dict()
        assert set(form.overrides) <= set(fields)
        assert form.model_type in TABLES


def test_an_unknown_model_type_is_refused_by_its_name() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lookup(SimpleNamespace(model_type="t5"))
    assert "'t5'" in caught.value.found
    assert all(model_type in caught.value.allowed for model_type in TABLES)
    assert caught.value.next_step


def test_plain_opt_is_not_refused() -> None:
    assert lookup(AutoConfig.for_model("opt", **tiny.OPT)) is TABLES["opt"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=false puts the norms after"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim differs from hidden_size"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm=true leaves no norm before the head"),
    ],
    ids=["post-norm", "projected", "no-final-norm"],
)
def test_a_variant_of_opt_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lookup(AutoConfig.for_model("opt", **tiny.OPT | values))
    assert "'opt'" in caught.value.found
    assert reason in caught.value.found
    assert ";" not in caught.value.found, "one variant, one reason"


def test_all_reasons_against_a_model_are_named() -> None:
    values = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}  # as OPT-350m
    with pytest.raises(UnsupportedModelError, match=r"do_layer_norm_before.*; word_embed_proj_dim"):
        lookup(AutoConfig.for_model("opt", **tiny.OPT | values))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "glm4"])
def test_norms_after_the_sublayer_are_refused_with_that_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        table_of(model_type)
    check_message(caught.value, repr(model_type), "norms after its sublayers")
