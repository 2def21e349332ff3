"""Folding norms into the readers and writers of the residual stream (SliceGPT, sections 3.1 and 3.2)."""

from torch import Tensor


def fold_into_reader(
    weight: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold a norm's gain and shift into a layer that reads it.

    W (gamma * x + beta) + b = (W diag(gamma)) x + (b + W beta).

    Args:
        weight: (..., out, D).
        bias: (..., out) or None.
        gain: gamma, (D,); None is all ones.
        shift: beta, (D,); None is all zeros.

    Returns:
        The folded weight (..., out, D) and bias (..., out). Without `bias` and `shift`, the bias is None.
    """
    if shift is not None:
        folded = weight @ shift
        bias = folded if bias is None else bias + folded
    return (weight if gain is None else weight * gain), bias


def centre_rows(rows: Tensor) -> Tensor:
    """Subtract each row's mean: x M with M = I - 11^T / D (section 3.2). Works on embeddings and on biases."""
    return rows - rows.mean(-1, keepdim=True)


def centre_writer(weight: Tensor) -> Tensor:
    """Return M W for a writer (..., D, in): its output gets zero mean over the stream's coordinates."""
    return weight - weight.mean(-2, keepdim=True)


def layer_norm(rows: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """LN(x) = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta over the last axis, in the dtype of the rows."""
    normal = centre_rows(rows) * (rows.var(-1, unbiased=False, keepdim=True) + eps).rsqrt() * gain
    return normal if shift is None else normal + shift
