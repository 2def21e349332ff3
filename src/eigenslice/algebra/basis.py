"""Orthonormal bases of the kept part of the residual stream. Everything in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Principal components of a stream.

    Attributes:
        values: (D,) eigenvalues of the second-moment matrix, descending.
        vectors: (D, D) orthogonal; column i belongs to value i. For a centred stream, the last column is the
            constant vector, along which such a stream is zero.
    """

    values: Tensor
    vectors: Tensor

    def energy(self, width: int) -> float:
        """Share of the stream's energy in the first `width` components."""
        total = float(self.values.sum())
        return float(self.values[:width].sum()) / total if total > 0 else 1.0


def zero_sum_basis(width: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal basis (width, width-1) of the vectors that sum to zero (Helmert's)."""
    i = torch.arange(1, width, dtype=torch.float64, device=device)
    norm = torch.sqrt(i * (i + 1))
    upper = torch.triu(torch.ones(width, width - 1, dtype=torch.float64, device=device)) / norm
    upper[torch.arange(1, width, device=device), torch.arange(width - 1, device=device)] = -i / norm
    return upper


def principal_components(moment: Tensor, centred: bool = False) -> Spectrum:
    """Eigenvectors of a second-moment matrix (SliceGPT, equation 7), by descending eigenvalue.

    Args:
        moment: (D, D) symmetric, float64.
        centred: The stream has zero mean over its D numbers (a LayerNorm model after folding). Then the search
            stays in that subspace, and the constant vector comes last, whatever rounding does to its zero
            eigenvalue.
    """
    if not centred:
        values, vectors = torch.linalg.eigh(moment)
        return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))
    width = moment.shape[0]
    basis = zero_sum_basis(width, moment.device)
    values, vectors = torch.linalg.eigh(basis.T @ moment @ basis)
    constant = torch.full((width, 1), 1 / math.sqrt(width), dtype=moment.dtype, device=moment.device)
    return Spectrum(
        torch.cat([values.flip(0).clamp_min(0), values.new_zeros(1)]),
        torch.cat([basis @ vectors.flip(1), constant], dim=1),
    )


def kept_basis(spectrum: Spectrum, width: int, constant: bool = False) -> Tensor:
    """The first `width` components, (D, width); with `constant`, the last of them is the constant vector."""
    if not constant:
        return spectrum.vectors[:, :width]
    return torch.cat([spectrum.vectors[:, : width - 1], spectrum.vectors[:, -1:]], dim=1)


def layer_norm_basis(spectrum: Spectrum, width: int) -> Tensor:
    """Basis (D, width) in which a stock LayerNorm over `width` numbers subtracts nothing.

    The first width-1 components of a centred stream, rotated so that their coordinates sum to zero; this costs
    one dimension. The constant vector of R^D takes the constant direction of R^width, so that the columns are
    orthonormal.
    """
    inside = spectrum.vectors[:, : width - 1] @ zero_sum_basis(width, spectrum.vectors.device).T
    return inside + spectrum.vectors[:, -1:] / math.sqrt(width)


def tied_basis(basis: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate a kept basis so that one matrix can serve as embedding and as head.

    The head reads E diag(g) x. Within the kept subspace any rotation is free. Let Q^T diag(g) Q = R L R^T. The rotation
    R makes the gain a diagonal again: the head is then E (Q R) with gain L. The only loss is the part of diag(g) x
    outside of the subspace.

    Args:
        basis: Q, (D, width).
        gain: g, the final norm's gain, (D,).

    Returns:
        Q R (D, width) and L (width,).
    """
    values, rotation = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
    return basis @ rotation, values
