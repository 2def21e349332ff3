"""The content of a checkpoint and the size of its results."""

from dataclasses import asdict, dataclass
from typing import Any

from eigenslice.checkpoint.source import open_source
from eigenslice.inspection.estimate import Estimate, estimate
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.plan.checks import rounded
from eigenslice.plan.forms import choose_form, stock_type_of
from eigenslice.plan.layout import count, dense_roles, layout
from eigenslice.plan.plan import BasisKind, Sizes, widths
from eigenslice.runtime.device import resolve_device

SLICINGS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class SizeRow:
    """The size of one result.

    Attributes:
        slicing: Share of the hidden width cut.
        width: Hidden width kept.
        basis: global or per-block.
        tied: True if embedding and head stay one matrix.
        saved_as: model_type of the result; eigenslice is the custom class.
        parameters: Stored parameters, tied weights once, shortcuts included.
        kept: parameters / the dense model's.
    """

    slicing: float
    width: int
    basis: BasisKind
    tied: bool
    saved_as: str
    parameters: int
    kept: float


@dataclass(frozen=True)
class Inspection:
    """The output of `eigenslice inspect`."""

    model: str
    model_type: str
    width: int
    blocks: int
    sites: int
    tied: bool
    dtype: str
    parameters: int
    by_role: dict[str, int]
    tokens: int
    vocabulary_share: float
    sizes: list[SizeRow]
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(
    name: str, trust_remote_code: bool = False, samples: int = 128, seqlen: int = 2048, device: str | None = None
) -> Inspection:
    """Look at a checkpoint; only its first block is run, to estimate how long slicing will take.

    Args:
        name: A folder, a hub id or a .gguf file.
        trust_remote_code: Let the tokenizer run code from the checkpoint.
        samples: Calibration sequences of the estimate.
        seqlen: Tokens per calibration sequence.
        device: torch device of the estimate; None is a GPU if there is one.

    Raises:
        OptionsError: no such device, or numbers out of range.
        CheckpointError: it can't be read.
        UnsupportedModelError: it can't be sliced; the message says why.
    """
    CalibrationOptions(samples=samples, seqlen=seqlen)  # refuses absurd numbers
    resolved = resolve_device(device)
    dense = DenseModel(open_source(name, trust_remote_code), resolved)
    anatomy, rows = dense.anatomy, []
    for basis in ("global", "per-block"):
        for slicing in SLICINGS:
            width = rounded((1 - slicing) * anatomy.width)
            tied = anatomy.can_stay_tied and basis == "global"
            plan = choose_form(anatomy, Sizes(width), basis=basis, tied=tied)
            stored = sum(count(layout(anatomy, plan)).values())
            saved_as = stock_type_of(plan.stock)
            kept = stored / anatomy.parameters
            rows.append(SizeRow(slicing, width, basis, plan.tied, saved_as, stored, kept))
    return Inspection(
        model=name,
        model_type=dense.table.model_type,
        width=anatomy.width,
        blocks=anatomy.block_count,
        sites=len(widths(anatomy, "global", anatomy.width)),
        tied=anatomy.tied,
        dtype=str(dense.dtype).removeprefix("torch."),
        parameters=anatomy.parameters,
        by_role=dense_roles(anatomy),
        tokens=anatomy.tokens,
        vocabulary_share=sum(anatomy.vocabulary_parameters.values()) / anatomy.parameters,
        sizes=rows,
        estimate=estimate(dense, samples * seqlen, seqlen, dense.running_dtype),
    )
