"""One pass of the dense model over the calibration tokens: what bases and neurons are chosen by."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.dense import DenseModel
from eigenslice.ranks import ALONE, Ranks
from eigenslice.resume import RunState
from eigenslice.stream import STREAMS, Activations, Batch, Stream

STAGE = "measuring"

HEAD_WEIGHT = 5.0
"""How much the site before the head counts in a global basis. What is cut there is cut from the logits; measured
on SmolLM2-135M at 3/4 of the width, 5 lowers the perplexity by 4 % against 1 before refitting (10 is no better)."""


@dataclass(frozen=True)
class Measurement:
    """What a pass over the dense model found.

    Attributes:
        moment: Second moment of the normalized stream, summed over sites, (D, D), float64.
        importance: For each block, the energy that each MLP neuron adds to the stream, as a share of the stream's,
            summed over tokens, (neurons,). Empty where neurons can't be cut.
    """

    moment: Tensor
    importance: list[Tensor]

    def kept(self, neurons: tuple[int, ...]) -> list[Tensor | None]:
        """The most important neurons of each block, ascending; None where all are kept."""
        if not self.importance:
            return [None] * len(neurons)
        return [
            None if count == len(energy) else energy.topk(count).indices.sort().values
            for count, energy in zip(neurons, self.importance, strict=True)
        ]


def measure(
    dense: DenseModel,
    stream: Stream,
    batches: list[Batch],
    progress: Callable[[int], None] = lambda block: None,
    neurons: bool = True,
    state: RunState | None = None,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Run the dense model once.

    A neuron's importance is sum over tokens of a_i^2 / mean(x^2), times |W_i|^2: the energy that it adds to the
    stream x, which the next norm divides by the stream's.

    Args:
        dense: The model.
        stream: Its stream.
        batches: This rank's calibration sequences.
        progress: Called with the number of each block.
        neurons: Whether neurons may be cut; their energies are measured then.
        state: Where to save what is found, and to go on from; None saves nothing.
        ranks: Whose sums are added up.
    """
    finished = state.result(STAGE) if state else None
    if finished:
        tensors, _ = finished
        return Measurement(tensors["moment"].to(dense.device), list(tensors["importance"].to(dense.device)))
    moment = torch.zeros(dense.width, dense.width, dtype=torch.float64, device=dense.device)
    count = dense.neurons if neurons else 0
    energies = torch.zeros(dense.blocks if count else 0, count, dtype=torch.float64, device=dense.device)
    columns = torch.ones_like(energies)  # squared norms of the MLP writers' columns

    def observe(block: int, a: Activations, inputs: Tensor) -> None:
        size = a.rows(a.hidden).square().mean(-1, keepdim=True) + dense.eps
        energies[block] += (a.rows(inputs).square() / size).sum(0).to(torch.float64)

    position = state.position(STAGE) if state else None
    if position:
        moment, energies, columns = (position.tensors[n].to(dense.device) for n in ("moment", "energies", "columns"))
    for site in stream.walk(batches, observe if count else None, position):
        progress(site.block)
        if state and site.index == 0 and site.block and not site.resumed:
            sums = {"moment": moment, "energies": energies, "columns": columns}
            state.save(STAGE, site.block, {STREAMS: site.streams}, sums, {})
        if count and site.layer is not None and site.index == 0:
            weight = site.layer.get_submodule(dense.table.mlp.writers[0]).weight
            columns[site.block] = weight.to(torch.float64).square().sum(0)
        moment += (HEAD_WEIGHT if site.layer is None else 1.0) * site.moment(normalized=True)
    importance = ranks.sum(energies) * columns
    ranks.sum(moment)
    if state:
        state.finish(STAGE, {"moment": moment, "importance": importance}, {})
    return Measurement(moment, list(importance))
