"""The block of a sliced model that is being fitted: its weights, and the streams that pass it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import SiteBasis
from eigenslice.model.dense import Tensors
from eigenslice.plan.plan import Plan
from eigenslice.plan.result_config import custom_config
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.stream.experts import Experts, MixtureInputs
from eigenslice.stream.run import Run
from eigenslice.stream.runner import BlockRunner, captured_inputs
from eigenslice.stream.walk import Activations


class SlicedBlock:
    """One block after the other of a sliced model in the making.

    Attributes:
        streams: The sliced stream before the sublayers that ran last, one tensor (B, T, width) a batch.
        basis: The basis of the stream.
        place: Number of the block in the result.
        weights: Weights of the block so far, out x in, in float32, the widest dtype that results are stored in; names
            relative to the block.
        inputs: Inputs of each writer to be fitted of the sublayers that ran last, (B, T, n) for each batch. Of a
            mixture of experts, its output, (B, T, width).
        mixture: Inputs of the writers of the mixture that ran last; None if none ran.
    """

    streams: OffloadedTensors

    def __init__(self, run: Run, plan: Plan, basis: SiteBasis) -> None:
        """Prepare the blocks of a plan; nothing is computed yet."""
        self.basis, self.place = basis, 0
        self.weights: Tensors = {}
        self.inputs: list[OffloadedTensors] = []
        self.mixture: MixtureInputs | None = None
        self._run, self._dense, self._kept_blocks = run, run.dense, plan.kept_blocks
        config = custom_config(run.dense.anatomy, replace(plan, stock=None), torch.float32)
        self._runner = BlockRunner(config, run.dense.table.layers, run.dense.device, run.dtype)
        self._sites = run.dense.anatomy.sites

    @property
    def layer(self) -> Any:
        """The block as a decoder layer."""
        return self._runner.layers[self.place]

    def kwargs(self, batch: Activations) -> dict[str, Any]:
        """Return the arguments of the block beside the stream."""
        return batch.kwargs[self._kept_blocks[self.place]]

    def assign(self, weights: Tensors) -> None:
        """Let the layer run with weights that the block doesn't keep."""
        self._runner.assign(self.layer, self._dense.as_modules(weights.items(), self.basis.width))

    def keep(self, weights: Tensors) -> None:
        """Change weights of the block, but not what the layer runs with."""
        self.weights |= {name: weight.float() for name, weight in weights.items()}

    def put(self, weights: Tensors) -> None:
        """Change weights of the block, and what the layer runs with."""
        self.keep(weights)
        self.assign({name: self.weights[name] for name in weights})

    def finish(self) -> Tensors:
        """Return the weights of the block, which takes no more memory then."""
        self._runner.release(self.layer)
        weights, self.weights = self.weights, {}
        return weights

    def writers(self, index: int) -> list[str]:
        """Return the writers at a site that are fitted together; none of a mixture, see `expert_writers`."""
        if self.mixture_at(index):
            return []
        return [
            name
            for s in self._sites[index]
            for name in (*s.writers, *s.normed_writers)
            if s.weight(name) in self.weights
        ]

    def mixture_at(self, index: int) -> Sublayer | None:
        """Return the mixture of experts at a site of this block, if there is one."""
        return next((s for s in self._sites[index] if any(name in self.weights for name in s.stacked)), None)

    def normalized(self, index: int, number: int) -> Tensor:
        """Return the stream of a batch as the sublayers at a site read it, (B, T, width)."""
        return self.layer.normalize(index, self.streams[number])

    def run(self, activations: list[Activations], index: int) -> None:
        """Run the sublayers at a site up to the writers that are to be fitted, and keep `inputs`."""
        writers, sublayer, self.mixture = self.writers(index), self.mixture_at(index), None
        for inputs in self.inputs:  # of a run with other readers
            inputs.clear()
        self.inputs = [self._run.offload.tensors() for _ in writers or [""]]
        if sublayer:
            experts = Experts.of(self._dense.table, sublayer, self.layer)
            self.mixture = MixtureInputs(sublayer, experts, self._run.offload)
        observed = sublayer.observed if sublayer else writers
        for number, batch in enumerate(activations):
            with captured_inputs(self.layer, observed, stop=not sublayer) as inputs:
                update = self.layer.update(index, self.normalized(index, number), **self.kwargs(batch))
            for kept_inputs, captured in zip(self.inputs, [inputs[w] for w in writers] or [update], strict=True):
                kept_inputs.append(captured)
            if self.mixture:
                self.mixture.append(batch, inputs)

    def missing(self, index: int, number: int, batch: Activations) -> Tensor:
        """Return what the sublayers at a site are to add to the sliced stream of a batch, (B, T, width).

        The sliced stream then is the dense stream of the batch, which is behind the sublayers, in the basis.
        """
        target, scale = self.basis.embed(batch.hidden), self.layer.scale_behind(index)
        return (target if scale is None else target / scale) - self.streams[number]

    def pass_on(self, index: int, number: int, written: Tensor) -> None:
        """Let the stream of a batch pass the sublayers at a site, which write (B, T, width)."""
        self.streams[number] = self.layer.pass_on(index, self.streams[number] + written)
