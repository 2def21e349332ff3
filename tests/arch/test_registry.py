"""The tables, against transformers' own models: names, shapes, and who reads and writes what."""

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eigenslice.arch import TABLES, Sublayer, Table, lookup, register_table, registry, table_of
from eigenslice.errors import OptionsError, UnsupportedModelError
from eigenslice.model.dense import empty_model
from tests import tiny
from tests.conftest import Slicer
from tests.messages import check_message
from tests.results import load

ROOT = Path(__file__).parents[2]
EPS = 3e-4  # no architecture's default


def config_of(case: str) -> Any:
    """Config of a case, with an unusual epsilon wherever the table says that the config has one."""
    model_type, values = tiny.CASES[case].model_type, tiny.CASES[case].config | tiny.CASES[case].extra
    eps = TABLES[model_type].eps
    values = copy.deepcopy(values) | ({eps: EPS} if isinstance(eps, str) else {})
    return AutoConfig.for_model(model_type, **values)


@cache
def model_of(case: str) -> Any:
    """transformers' model of a case, without memory for its weights."""
    return empty_model(config_of(case))


def table_for(case: str) -> Table:
    """The table that holds for a case's config."""
    return lookup(config_of(case))


def layers_of(case: str) -> Any:
    return model_of(case).get_submodule(table_for(case).layers)


def norms_of(table: Table) -> set[str]:
    """The norms that a table names in a layer, after sublayers, too."""
    return {norm for s in table.sublayers for norm in (s.norm, s.post_norm) if norm}


def names_of(table: Table) -> set[str]:
    """Every module or parameter that a table names in a layer of transformers' model."""
    return norms_of(table) | {name for s in table.sublayers for name in (*s.modules, *linear(s), *s.inner)}


def linear(sublayer: Sublayer) -> tuple[str, ...]:
    """A sublayer's readers and writers, also of a norm's input."""
    return (*sublayer.ends, *sublayer.normed_writers)


cases = pytest.mark.parametrize("case", tiny.CASES)


def test_the_cases_cover_every_table() -> None:
    assert {case.model_type for case in tiny.CASES.values()} == set(TABLES)


def test_tables_are_found_by_their_own_model_type() -> None:
    for model_type, table in TABLES.items():
        assert table.model_type == model_type
        assert table_of(model_type) is table


@cases
def test_outer_names_exist(case: str) -> None:
    model, table = model_of(case), table_for(case)
    assert model.get_submodule(table.embeddings[0]) is model.get_input_embeddings()
    assert model.get_submodule(table.lm_head) is model.get_output_embeddings()
    assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in table.embeddings)
    assert len(model.get_submodule(table.layers)) == model.config.num_hidden_layers
    assert "norm" in type(model.get_submodule(table.final_norm)).__name__.lower()


@pytest.mark.parametrize("model_type", TABLES)
def test_every_name_in_a_layer_exists_in_some_variant(model_type: str) -> None:
    """No table names what no model has: in a mistyped name, the real one would be missing."""
    cases = [name for name, case in tiny.CASES.items() if case.model_type == model_type]
    present: set[str] = set()
    for case in cases:
        for layer in layers_of(case):
            present |= {name for name, _ in layer.named_modules()} | set(layer.state_dict())
    assert set().union(*(names_of(table_for(case)) for case in cases)) <= present


@cases
def test_every_parameter_of_a_layer_has_exactly_one_role(case: str) -> None:
    table = table_for(case)
    roles = [*norms_of(table), *(name for s in table.sublayers for name in (*linear(s), *s.inner))]
    assert len(roles) == len(set(roles))
    for layer in layers_of(case):
        for name in layer.state_dict():
            owners = [role for role in roles if name in (role, role + "_bias", role + ".weight", role + ".bias")]
            owners = owners or [role for role in roles if name.startswith(role + ".")]
            assert len(owners) == 1, name


@cases
def test_every_parameter_outside_of_the_layers_is_named(case: str) -> None:
    model, table = model_of(case), table_for(case)
    outer = {*table.embeddings, table.final_norm, table.lm_head} | {table.embedding_norm} - {None}
    names = {name.rpartition(".")[0] for name in model.state_dict() if not name.startswith(table.layers + ".")}
    assert names <= outer
    assert outer - {table.final_norm} <= names  # the final norm may be without parameters


@cases
def test_readers_and_writers_have_the_stream_at_their_end(case: str) -> None:
    table, width = table_for(case), tiny.WIDTH
    for layer in layers_of(case):
        state = layer.state_dict()
        for sublayer in table.sublayers:
            weights = {name: sublayer.weight(name) for name in linear(sublayer)}
            shapes = {name: tuple(state[weight].shape) for name, weight in weights.items() if weight in state}
            assert {
                sublayer.transpose_shape(name, shapes[name])[-1] for name in sublayer.readers if name in shapes
            } == {width}
            writers = [name for name in (*sublayer.writers, *sublayer.normed_writers) if name in shapes]
            assert {sublayer.transpose_shape(name, shapes[name])[-2] for name in writers} == {width}
            assert bool(sublayer.post_norm) == bool(sublayer.normed_writers)


@cases
def test_the_norm_is_of_the_kind_that_the_table_says(case: str) -> None:
    """Its kind, gain and epsilon, by what each norm makes of numbers."""
    table, x = table_for(case), 3 + torch.randn(5, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    x = 0.01 * x  # so that the epsilon counts
    layer = f"{table.layers}.0."
    for name in [*(layer + norm for norm in norms_of(table)), table.final_norm]:
        norm = copy.deepcopy(model_of(case).get_submodule(name)).to_empty(device="cpu")
        tensors = {
            kind: torch.randn(tiny.WIDTH) for kind in ("weight", "bias") if getattr(norm, kind, None) is not None
        }
        norm.load_state_dict(tensors)
        with torch.no_grad():
            actual = norm(x)
        y = x - x.mean(-1, keepdim=True) if table.norm == "layer" else x
        y = y / (y.square().mean(-1, keepdim=True) + table.epsilon(config_of(case))).sqrt()
        gain = tensors.get("weight", torch.ones(tiny.WIDTH)) + (table.gain == "1+w")
        torch.testing.assert_close(actual, y * gain + tensors.get("bias", 0))


@cases
def test_the_dropout_is_a_field_of_the_config(case: str) -> None:
    dropout = table_for(case).dropout
    assert dropout is None or isinstance(getattr(config_of(case), dropout), float)


class Record:
    """What goes into and comes out of a module when it runs, as tokens x numbers."""

    def __init__(self, module: nn.Module) -> None:
        self.input, self.output = torch.empty(0), torch.empty(0)
        module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        self.input, self.output = x.flatten(0, -2), y.flatten(0, -2).clone()  # Falcon adds in place


plain_cases = pytest.mark.parametrize(
    "case",
    [
        case
        for case in tiny.CASES
        if not any(s.stacked or s.adds_stream for s in TABLES[tiny.CASES[case].model_type].sublayers)
    ],
)


@plain_cases
def test_a_running_layer_does_what_the_table_says(case: str) -> None:
    """Readers get the norm's output, modules follow each other, and their last output joins the stream.

    Without a norm before them, readers get the stream. A norm behind them gets what is written.
    """
    model, table = tiny.CASES[case].build(), table_for(case)
    layer = model.get_submodule(table.layers)[1]
    records = {name: Record(layer.get_submodule(name)) for name in names_of(table) if _has(layer, name)}
    records["layer"] = Record(layer)
    with torch.no_grad():
        model(tiny.random_ids(2, 7))
    stream: Tensor = records["layer"].input
    for sublayers in table.sites(model.config):
        added: list[Tensor] = []
        for sublayer in sublayers:
            read = stream
            if sublayer.norm:
                torch.testing.assert_close(records[sublayer.norm].input, stream)
                read = records[sublayer.norm].output
            modules, readers, writers = (
                [records[name] for name in names if name in records]  # layers of one model may differ
                for names in (sublayer.modules, sublayer.readers, (*sublayer.writers, *sublayer.normed_writers))
            )
            torch.testing.assert_close(modules[0].input, read)
            for before, after in itertools.pairwise(modules):
                assert torch.equal(after.input, before.output)
            assert readers
            for reader in readers:
                torch.testing.assert_close(reader.input, read)
            written = records[sublayer.post_norm].input if sublayer.post_norm else modules[-1].output
            torch.testing.assert_close(sum(writer.output for writer in writers), written)
            added.append(modules[-1].output)
        scale = getattr(model.config, table.residual_scale) if table.residual_scale else 1
        stream = stream + scale * sum(added)
    if table.stream_scale:
        stream = stream * layer.get_buffer(table.stream_scale)
    torch.testing.assert_close(records["layer"].output, stream)


def _has(layer: nn.Module, name: str) -> bool:
    return any(name == present for present, _ in layer.named_modules())


PARALLEL = {"phi", "phi-tied", "phi-qk-norm", "gpt_neox", "gpt_neox-tied", "cohere", "cohere2", "cohere2-tied", "gptj"}
PARALLEL |= {"codegen", "falcon", "falcon-new", "falcon-new-one-norm", "stablelm-parallel"}


@cases
def test_parallel_blocks_have_one_site_and_others_two(case: str) -> None:
    expected = 1 if case in PARALLEL else 2
    table = table_for(case)
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
    assert "docs/support.md" in caught.value.allowed
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input"),
        ({"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}, "num_kv_shared_layers"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, "enable_moe_block"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ],
    ids=["per-layer-inputs", "shared-keys", "experts", "bidirectional"],
)
def test_a_variant_of_gemma_4_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    case = tiny.CASES["gemma4_text"]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        lookup(AutoConfig.for_model("gemma4_text", **copy.deepcopy(case.config | case.extra | values)))
    assert ";" not in caught.value.found, "one variant, one reason"


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


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bert", "is an encoder, not a decoder"),
        ("t5", "is an encoder-decoder"),
        ("llava", "reads images"),
        ("gemma3", "reads images"),
        ("vit", "is a vision model"),
        ("gemma3n_text", "side by side"),
        ("biogpt", "has no architecture table yet"),
        ("no-such-type", "is no language model that transformers knows"),
    ],
)
def test_other_types_are_refused_with_the_reason(model_type: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        table_of(model_type)
    check_message(caught.value, repr(model_type), why)
    assert "\n" not in caught.value.found


@pytest.fixture
def own_type() -> Iterator[Table]:
    """A table of a type of our own: Llama's, under another name."""
    table = replace(TABLES["llama"], model_type="own_llama", stock=())
    AutoConfig.register("own_llama", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    yield table
    TABLES.pop("own_llama", None)


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_registered_table_makes_its_type_work(own_type: Table, run_slice: Slicer, tmp_path: Path) -> None:
    folder = tiny.save(tiny.tiny_model("own_llama", tiny.LLAMA), tmp_path / "own")
    with pytest.raises(UnsupportedModelError, match="'own_llama' is no language model"):
        run_slice("llama", model=str(folder), width=24)
    register_table(own_type)
    result = run_slice("llama", model=str(folder), width=tiny.WIDTH)
    ids = tiny.random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(load(result.output)(ids).logits, load(folder)(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionsError, match="has a table already"):
        register_table(own_type)


def test_a_table_is_found_by_an_entry_point(own_type: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(load=lambda: own_type)
    offered = {("eigenslice.tables", "own_llama"): [entry]}
    monkeypatch.setattr(registry, "entry_points", lambda group, name: offered.get((group, name), []))
    assert table_of("own_llama") is own_type
    with pytest.raises(UnsupportedModelError):
        table_of("other_llama")


def test_the_support_page_names_every_type() -> None:
    text = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    section = text[text.index("| result | types") : text.index("- LayerNorm models with tied embeddings")]
    assert set(re.findall(r"`(\w+)`", section)) - {"model_type"} == set(TABLES)
    assert f"these {len(TABLES)} `model_type`s" in text


def test_the_readme_counts_the_types() -> None:
    assert f"models of {len(TABLES)} types" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_support_page_has_every_case() -> None:
    page = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\S+) \| `\w+` \|", page, re.MULTILINE)) == set(tiny.CASES)
