"""MLP neurons chosen by a score, and the writer fitted to the dense output on the dense activations.

With the Gram matrix C of the neurons' activations over the calibration tokens and the kept neurons K, the writer
W_K = W C[:, K] C[K, K]^+ minimizes the squared error of the MLP's output. It is also the Nystrom approximation's
writer, (S^T C S)^+ S^T C W_D in MoDeGPT (arXiv 2408.09632, algorithm 1), whose matrices are transposed.

Scores: energy, sum of a^2 times the squared norm of the neuron's column; ridge leverage scores, as MoDeGPT's type I
takes them; and random ones, for comparison. All blocks keep the same number of neurons: MoDeGPT's ratios of blocks
(its equation for global sparsity) and its types II and III, for attention, are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baselines import check_llama_like, shared_copy
from eigenslice.data.batches import Batch
from rivals.parts import keep_neurons
from rivals.sizes import losses
from rivals.stream import Gram, Stream

Scores = Callable[[Tensor, Tensor], Tensor]
"""From a Gram matrix (I, I) and a writer (D, I), both float64, to scores (I,)."""
LEVERAGE_RIDGE = 0.01
"""Ridge of the leverage scores. The paper's algorithm leaves it open; public implementations take 0.01 for sums over
tokens. So small a ridge hardly changes the order."""
SEED = 0


@torch.no_grad()
def prune(model: Any, batches: list[Batch], most: int, scores: Scores) -> Any:
    """Keep the neurons of the highest scores, the same number in each block; one pass of the dense model.

    Raises:
        EigensliceError: the model isn't Llama-like, or can't be made so small.
    """
    check_llama_like(model)
    lost = losses(model, most, heads=False)
    smaller = shared_copy(model)
    stream = Stream(smaller, batches)
    for number, block in enumerate(smaller.model.layers):
        down, gram = block.mlp.down_proj, Gram(block.mlp.down_proj)
        stream.advance(number, block, {down: gram.add})
        _, gone = lost[number]
        if gone:
            weight = down.weight.double()
            kept = scores(gram.sum, weight).topk(down.in_features - gone).indices.sort().values
            keep_neurons(block.mlp, kept, nystrom(gram.sum, weight, kept))
    return smaller


def nystrom(gram: Tensor, writer: Tensor, kept: Tensor) -> Tensor:
    """Writer (D, n) of the kept neurons (n,): writer C[:, K] C[K, K]^+, in float64."""
    return writer @ gram[:, kept] @ torch.linalg.pinv(gram[kept][:, kept], hermitian=True)


def energy(gram: Tensor, writer: Tensor) -> Tensor:
    """Sum of a^2 over tokens, times the squared norm of the neuron's column."""
    return gram.diagonal() * writer.square().sum(0)


def leverage(gram: Tensor, writer: Tensor) -> Tensor:
    """Ridge leverage scores, the diagonal of C (C + ridge)^-1."""
    ridge = LEVERAGE_RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # C (C + r)^-1 = 1 - r (C + r)^-1; where the scores are near 1, only the second term tells them apart
    return -torch.linalg.inv(gram + ridge).diagonal()


def random_scores(gram: Tensor, writer: Tensor) -> Tensor:
    """The same random scores for each block."""
    scores = torch.rand(len(gram), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return scores.to(gram.device)
