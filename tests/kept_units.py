"""The units that a result has, found by their outputs in the dense model, which then loses the other ones.

Heads, and neurons outside of mixtures. Without fits, a result of the dense width is the dense model in which the
writers' columns of the other units are zero.
"""

from typing import Any

import torch

from eigenslice.arch import Sublayer, Table
from eigenslice.modeling import SlicedForCausalLM
from tests import tiny
from tests.results import relative

IDS = tiny.random_ids(3, 20)


def unwrapped(model: Any) -> Any:
    """The architecture's own model, inside of the custom class or without."""
    return model.model if isinstance(model, SlicedForCausalLM) else model


def writers(model: Any, table: Table, sublayer: Sublayer) -> list[Any]:
    """The writers of heads or neurons, block by block; a recurrent layer has none of heads."""
    name = sublayer.neuron_writer
    layers = unwrapped(model).get_submodule(table.layers)
    return [layer.get_submodule(name) for layer in layers if any(name == module for module, _ in layer.named_modules())]


def columns(writer: Any, sublayer: Sublayer) -> torch.Tensor:
    """The weight of a writer, out x in, as a view."""
    return writer.weight.data.T if sublayer.neuron_writer in sublayer.transposed else writer.weight.data


def kept_units(model: Any, sliced: Any, table: Table, sublayer: Sublayer, units: int) -> list[list[int]]:
    """Return the dense units that each block of a result has, and set the others' columns to zero in the dense model.

    A unit of the result is the dense unit with the same output, and no other dense unit has this output.

    Args:
        model: The dense model.
        sliced: The result, as many blocks as the dense model has.
        table: The dense model's table.
        sublayer: Attention or MLP.
        units: Number of units in each block of the dense model.
    """
    result = []
    for before, after in zip(writers(model, table, sublayer), writers(sliced, table, sublayer), strict=True):
        outputs = []
        for whole, writer in ((model, before), (sliced, after)):
            seen: list[torch.Tensor] = []
            handle = writer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
            with torch.no_grad():
                whole(IDS)
            handle.remove()
            outputs.append(seen[0])
        size = outputs[0].shape[1] // units
        theirs, ours = (output.unflatten(1, (-1, size)).transpose(0, 1).flatten(1) for output in outputs)
        distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = (distances / theirs.norm(dim=1).clamp_min(1e-30)).sort(dim=1)
        assert float(nearest.values[:, 0].max()) < 1e-4
        assert float(nearest.values[:, 1].min()) > 1e-3
        kept = nearest.indices[:, 0].tolist()
        result.append(kept)
        gone = [unit for unit in range(units) if unit not in kept]
        columns(before, sublayer).unflatten(1, (units, -1))[:, gone] = 0
    return result


def check_logits(model: Any, sliced: Any) -> None:
    """A result gives the logits of the dense model."""
    with torch.no_grad():
        expected, got = model(IDS).logits, sliced(IDS).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def check_cache(model: Any) -> None:
    """Token by token through the cache, a model gives the same logits; and it generates."""
    past, steps = None, []
    with torch.no_grad():
        for i in range(6):
            output = model(IDS[:, i : i + 1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            steps.append(output.logits)
        whole = model(IDS[:, :6]).logits
        assert relative(torch.cat(steps, dim=1), whole) < 1e-4
        written = model.generate(IDS[:, :6], max_new_tokens=3, do_sample=False)
        assert torch.equal(written[:, 6], whole[:, -1].argmax(-1)) or written.shape[1] < 9
