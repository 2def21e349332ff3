"""Memory that activations and a whole model take, in bytes."""

import torch

from eigenslice.data.own_text import SAMPLING_STAGE
from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.offload import FREE_SHARE, free_bytes

WRITING = 3.5
"""Time of a token that the model writes, over that of one it reads: measured on SmolLM2-135M, on 2 CPU cores."""


def activation_bytes(anatomy: Anatomy, tokens: int, dtype: torch.dtype, *, refitted: bool = False) -> int:
    """Return the bytes of the activations that live at once: two streams, and the inputs of the widest writers.

    If layers are refitted, the inputs of MLP neurons and the slopes of their outputs, at some of the tokens, count,
    too.
    """
    item = torch.empty((), dtype=dtype).element_size()
    width, rows = anatomy.width, anatomy.neuron_rows
    inner = anatomy.neuron_count
    if anatomy.expert_count:  # a fit keeps the experts' input and output, what is missing, and shared experts' neurons
        inner = 3 * width + anatomy.shared_neuron_count if refitted else 0
    read = (width + rows) / curvature_stride(tokens) if refitted and rows else 0
    return int(tokens * (2 * width + max(width, inner) + read)) * item


def advice(options: SliceOptions, stage: str) -> str:
    """Return what to change where memory has run out in a stage; --offload and --device may change on --resume."""
    if stage == SAMPLING_STAGE:
        return "--own-text 0 needs no whole model in memory; a GPU with more memory may hold it"
    less = "a new run with fewer --samples or a shorter --seqlen takes less"
    if options.offload != "disk":
        less = f"add --offload disk, which keeps activations in files; {less}"
    return f"{less}; torchrun divides activations by the number of GPUs"


def whole_bytes(dense: DenseModel, dtype: torch.dtype) -> int:
    """Return the bytes of the model's weights as transformers loads it, with the parts that read images."""
    source, parameters = dense.source, dense.anatomy.parameters
    if source.whole is not None:
        parameters = sum(torch.Size(source.weights.shape(name)).numel() for name in source.weights.names())
    return parameters * dtype.itemsize


def room_for_model(device: torch.device) -> int:
    """Return the bytes that the whole model may take to write text, unless it was asked for.

    The rest of the free memory holds its cache and logits.
    """
    return int(FREE_SHARE * free_bytes(device))


def training_bytes(parameters: int, teacher: int, tokens: int, vocabulary: int) -> int:
    """Return the bytes that training all weights takes, without the activations.

    A weight takes 16 bytes: itself, its gradient and two numbers of AdamW, in float32. A logit takes 12: the model's,
    the teacher's and the gradient.

    Args:
        parameters: Number of weights that are trained.
        teacher: Bytes of the dense model.
        tokens: Number of tokens that pass at once.
        vocabulary: Number of tokens of the vocabulary.
    """
    return 16 * parameters + teacher + 12 * tokens * vocabulary


def shared_training_bytes(held: int, passing: int, gathered: int, processes: int) -> int:
    """Return the bytes that a training takes in each of several processes that share the weights.

    Args:
        held: Bytes of the weights, gradients, optimizer and teacher, which are shared.
        passing: Bytes of the logits, of which each process has its own.
        gathered: Bytes of the answer of `gathered_numbers`, in the dtype that is computed in.
        processes: Number of processes.
    """
    return passing + held if processes == 1 else passing + held // processes + gathered


def gathered_numbers(block: int, vocabulary: int) -> int:
    """Return the largest number of weights that are gathered at once in a process.

    In blocks: the model's block, the next one, their gradient, and the teacher's two. Outside of blocks: the model's,
    the gradient, and the teacher's.

    Args:
        block: Number of weights of the largest block.
        vocabulary: Number of weights outside of the blocks.
    """
    return 5 * block + 3 * vocabulary
