"""Mixtures that lose whole experts, against transformers' dense model with a router that never chooses them."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eigenslice.arch import lookup
from eigenslice.errors import OptionsError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.stream.runner import has_experts
from tests import tiny
from tests.conftest import Recipe, Slicer
from tests.messages import check_message
from tests.mixtures import ends, experts_of, neurons_of
from tests.results import load, relative, size, stored_tensors

CASES = [case for case, mlp in tiny.MLPS.items() if mlp.stacked]
EXPERTS, KEPT = 8, 6
IDS = tiny.random_ids(2, 20, seed=5)
FIELDS = "n_routed_experts", "num_local_experts", "num_experts"
NEVER = -1e9
"""A router's logit with a probability of zero."""
Mixtures = Callable[[str], Path]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    """Gives the folder of a case's model with eight experts, of which two groups of four at least keep two each."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            about = tiny.CASES[case]
            config = copy.deepcopy(about.config | about.extra)
            config |= {name: EXPERTS for name in FIELDS if name in config}
            folder = tmp_path_factory.mktemp(case) / "dense"
            made[case] = tiny.save(tiny.tiny_model(about.model_type, config), folder)
        return made[case]

    return make


def mixture_layers(model: Any) -> list[tuple[int, Any]]:
    """Numbers and layers with experts."""
    table = lookup(model.config)
    layers = enumerate(model.get_submodule(table.layers))
    return [(number, layer) for number, layer in layers if has_experts(layer, table.mlp)]


def router_of(layer: Any, model: Any) -> Any:
    return layer.get_submodule(lookup(model.config).mlp.routers[0])


@contextmanager
def never_chosen(model: Any, gone: dict[int, list[int]]) -> Iterator[None]:
    """Let routers never choose some experts, by the number of the layer: no weight is changed but corrections."""
    linear, routers = torch.nn.functional.linear, {}
    for number, layer in mixture_layers(model):
        routers[router_of(layer, model).weight.data_ptr()] = gone[number]
        for name, buffer in layer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[gone[number]] = NEVER

    def masked(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(inputs, weight, bias)
        if weight.data_ptr() in routers:
            logits[..., routers[weight.data_ptr()]] = NEVER
        return logits

    torch.nn.functional.linear = masked
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def outputs(case: str, experts: Any, mlp: Any, arguments: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert, norms of its outputs times the router's weight, and the numbers of its tokens."""
    for expert, (reader, writer) in enumerate(zip(*ends(experts, mlp), strict=True)):
        if len(arguments) == 1:  # Llama 4: inputs are scaled, and zero where they are other experts'
            rows = arguments[0].view(EXPERTS, -1, arguments[0].shape[-1])[expert]
            tokens = torch.where(rows.any(-1))[0]
            rows, weights = rows[tokens], torch.ones(len(tokens))
        else:
            hidden, index, scores = (x.flatten(0, -2) for x in arguments)
            tokens, place = torch.where(index == expert)
            rows, weights = hidden[tokens], scores[tokens, place]
        inner, bias = rows @ reader.T, torch.zeros(())
        if case == "gpt_oss":
            inner, bias = inner + experts.gate_up_proj_bias[expert], experts.down_proj_bias[expert]
            gate, up = inner[:, ::2].clamp(max=experts.limit), inner[:, 1::2].clamp(-experts.limit, experts.limit)
            inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
        written = (inner @ writer.T + bias) * weights[:, None]
        if lookup(experts_config(case)).norm == "layer":  # the mean is nothing behind a LayerNorm
            written = written - written.mean(-1, keepdim=True)
        yield written.norm(dim=-1), tokens


def experts_config(case: str) -> Any:
    return tiny.CASES[case].build().config


def least(case: str, model: Any, ids: Tensor) -> dict[int, list[int]]:
    """Experts of each layer that write least beside the stream, summed over tokens; equally many of each group."""
    table, gone = lookup(model.config), {}
    seen: dict[int, tuple[Tensor, ...]] = {}
    streams: dict[int, Tensor] = {}
    for number, layer in mixture_layers(model):
        layer.get_submodule(table.mlp.norm).register_forward_pre_hook(
            lambda _, args, number=number: streams.update({number: args[0].flatten(0, 1)})
        )
        layer.get_submodule(table.mlp.experts).register_forward_pre_hook(
            lambda _, args, number=number: seen.update({number: args})
        )
    with torch.no_grad():
        model(ids)
    groups = int(getattr(model.config, "n_group", 1) or 1)
    for (number, _), experts in zip(mixture_layers(model), experts_of(model), strict=True):
        found, stream = outputs(case, experts, table.mlp, seen[number]), streams[number]
        if table.norm == "layer":
            stream = stream - stream.mean(-1, keepdim=True)
        share = (stream.square().mean(-1) + table.epsilon(model.config)).rsqrt()
        saliency = torch.stack([(norms * share[tokens]).sum() for norms, tokens in found])
        parts = saliency.view(groups, -1).argsort(dim=-1)[:, : (EXPERTS - KEPT) // groups]
        gone[number] = (parts + torch.arange(groups)[:, None] * (EXPERTS // groups)).flatten().tolist()
    return gone


@pytest.mark.parametrize("form", ["auto", "custom"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_without_experts_is_one_that_never_chooses_them(
    case: str, form: str, mixture: Mixtures, run_slice: Slicer, none_held_out: CalibrationOptions
) -> None:
    """At full width and without a fit. The experts that go are found here anew."""
    folder = mixture(case)
    result = run_slice(case, model=str(folder), experts=KEPT, refit=False, form=form, calibration=none_held_out)
    model = load(folder, experts_implementation="eager")
    gone = least(case, model, load_file(none_held_out.data[0])["calibration"])
    with torch.no_grad():
        dense = model(IDS).logits
        with never_chosen(model, gone):
            expected = model(IDS).logits
        actual = load(result.output)(IDS).logits
    assert relative(actual, expected) < 1e-5
    if case != "llama4_text":  # where a token has one expert, all may have been kept
        assert relative(dense, expected) > 0.02
    manifest = result.manifest
    if form == "auto":  # at full width olmoe is stock, too
        assert manifest["form"] == "stock"
    assert (manifest["plan"]["experts"], manifest["dense_experts"]) == (KEPT, EXPERTS)
    stored = sum(map(math.prod, stored_tensors(result.output).values()))
    assert manifest["parameters"]["stored"] == stored == size(load(result.output))


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "olmoe"])
def test_experts_neurons_and_width_are_cut_together(case: str, mixture: Mixtures, run_slice: Slicer) -> None:
    """The result runs with transformers' default way to run experts."""
    folder = mixture(case)
    dense = load(folder)
    (whole,) = neurons_of(dense)
    result = run_slice(case, model=str(folder), experts=KEPT, neurons=whole - 8, width=24)
    model = load(result.output)
    assert neurons_of(model) == {whole - 8}
    assert {len(ends(experts, lookup(dense.config).mlp)[0]) for experts in experts_of(model)} == {KEPT}
    with torch.no_grad():
        assert relative(model(IDS).logits, dense(IDS).logits) < 0.9
    again = run_slice(case, model=str(folder), recipe=result.output / "eigenslice.json")
    assert again.manifest["plan"] == result.manifest["plan"]
    tensors, other = (load_file(folder.output / "model.safetensors") for folder in (result, again))
    assert all(tensors[name].equal(other[name]) for name in tensors)


def test_a_size_is_reached_by_experts_too(mixture: Mixtures, run_slice: Slicer) -> None:
    """Half of the cut, all of it, and none of it."""
    manifest = run_slice("qwen3_moe", model=str(mixture("qwen3_moe")), keep=0.8, heads=False, multiple=4).manifest
    assert 0.75 < manifest["parameters"]["kept"] <= 0.8
    trials = [trial for trial in manifest["trials"] if trial["width"] == tiny.WIDTH]
    tried = {(trial.get("experts", EXPERTS), trial["neurons"]) for trial in trials}
    experts = {count for count, _ in tried}
    assert len(experts) == 3
    assert max(experts) == EXPERTS
    fewest = max(neurons for count, neurons in tried if count == min(experts))
    assert fewest > max(neurons for count, neurons in tried if count == EXPERTS)


@pytest.mark.parametrize(
    ("case", "options", "found"),
    [
        ("mixtral", {"experts": 1}, "--experts 1; the model has 8 experts"),
        ("mixtral", {"experts": 9}, "--experts 9; the model has 8 experts"),
        ("deepseek_v3", {"experts": 5}, "--experts 5; the model has 8 experts"),
        ("deepseek_v3", {"experts": 2}, "--experts 2; the model has 8 experts"),
        ("mixtral", {"experts": 6, "basis": "per-block"}, "--experts 6; the model has 8 experts"),
        ("mixtral", {"experts": 6, "keep": 0.8}, "--experts 6 with --keep or --recipe"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused(
    case: str, options: dict[str, Any], found: str, mixture: Mixtures, run_slice: Slicer
) -> None:
    with pytest.raises(OptionsError) as caught:
        run_slice(case, model=str(mixture(case)), **options)
    check_message(caught.value, found)


def test_a_model_without_experts_keeps_none(run_slice: Slicer, recipe: Recipe) -> None:
    for options, found in [({"experts": 2}, "--experts 2"), ({"recipe": recipe(experts=2)}, "the recipe keeps 2")]:
        with pytest.raises(OptionsError) as caught:
            run_slice("llama", **options)
        check_message(caught.value, found)
