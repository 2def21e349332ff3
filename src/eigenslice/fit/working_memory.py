"""Memory that slicing takes beside the activations, in bytes."""

import torch

from eigenslice.model.anatomy import Anatomy


def working_bytes(anatomy: Anatomy, dtype: torch.dtype, neurons: int, twins: int) -> int:
    """Count the memory that slicing takes beside the activations.

    Without refit, that is a block being run while the next one is read, beside matrices of the basis; or the
    embeddings. With refit, a block of each sliced model that is fitted, whose weights are kept in float32, one Gram
    matrix in float64, its factor in float32, and three times the largest writer in float64.

    Args:
        anatomy: The model's anatomy.
        dtype: The dtype of the forward pass.
        neurons: Number of neurons that the result keeps in an MLP.
        twins: Number of sliced models that are fitted beside each other; 0 without refit.
    """
    weights, item, bases = max(anatomy.block_sizes), dtype.itemsize, 6 * anatomy.width**2 * 8
    plain = max(2 * weights * max(4, item) + bases, anatomy.tokens * anatomy.width * item)
    cut = (anatomy.neuron_count - neurons) * anatomy.width if not anatomy.expert_count else 0
    kept = weights - cut - cut * anatomy.neuron_rows // max(1, anatomy.neuron_count)
    block = kept * (item if dtype == torch.float32 else item + 4)
    inputs = max(anatomy.width, neurons)
    fitting = inputs**2 * (8 + 4) + 3 * inputs * anatomy.width * 8
    return max(plain, weights * max(4, item) + twins * block + bases + fitting) if twins else plain
