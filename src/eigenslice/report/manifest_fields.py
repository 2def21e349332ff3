"""Required fields of a manifest for its readers: report, card, fine-tuning. Other fields are allowed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**53
"""The largest count: JSON's readers hold whole numbers exactly up to here."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=5000)]
Rank = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Point = Annotated[list[float], Field(min_length=2, max_length=2)]
Scalar = bool | int | float | Name | None
Values = dict[Name, Scalar | list[Scalar]]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Plan(_Fields):
    """`Plan.describe`."""

    basis: Literal["global", "per-block"]
    width: Size
    neurons: Count | Annotated[list[Count], Field(min_length=1)]
    tied: bool
    key_value_heads: Size | None = None
    experts: Size | None = None
    query_heads: Size | None = None
    dropped_blocks: list[Count] = []


class Parameters(_Fields):
    """Stored parameters."""

    dense: Size
    stored: Count
    kept: Number
    by_role: dict[Name, Count]
    dense_by_role: dict[Name, Count] | None = None


class Source(_Fields):
    """The dense model."""

    name: Name
    revision: Name | None = None
    model_type: Name
    sha256: dict[Name, Name]


class Part(_Fields):
    """One text of several."""

    data: Name
    sequences: Count


class Text(_Fields):
    """`Tokens.description`."""

    data: Name | list[Part]
    sequences: Count
    tokens: Count


class Characters(_Fields):
    """A text that decided which tokens stay."""

    data: Name
    characters: Count


class Length(_Fields):
    """Tokens of a text before and after the cut of the vocabulary."""

    data: Name
    characters: Count
    tokens_before: Count
    tokens_after: Count


class Vocabulary(_Fields):
    """The tokens that stay, if some are left out."""

    dense: Size
    kept: Size
    chosen: Literal["number", "needed"]
    share_of_text: Number
    texts: list[Characters]
    lengths: list[Length]
    left_out_files: list[Name] = []


class Options(_Fields):
    """The options of the user."""

    __pydantic_extra__: dict[str, Scalar | list[Scalar]]

    model: Name
    output: Name
    calibration: Values | None = None
    data: Values | None = None


class Site(_Fields):
    """`site_summary`."""

    site: Name
    width: Count
    energy_kept: float = 0.0
    eigenvalues: dict[Rank, float] = {}


class Fit(_Fields):
    """The error of a fitted block."""

    block: Count
    error: float
    energy_kept: float = 0.0


class Loss(_Fields):
    """The loss on held-out text, see `measure.loss.Loss`."""

    kl: Positive
    perplexity_ratio: Positive
    dense_perplexity: Positive
    sliced_perplexity: Positive
    tokens: Size
    finetuned: bool = False


class NotMeasured(_Fields):
    """The reason why no loss is known."""

    model_config = ConfigDict(extra="forbid")

    not_measured: Name


class Perplexities(_Fields):
    """Perplexities of held-out windows."""

    before: Number
    after: Number
    tokens: Count


class TextLoss(_Fields):
    """The objective of a training on held-out windows of a text."""

    text: Name
    before: Number
    after: Number


class Training(_Fields):
    """The section that `finetune` adds."""

    best_step: Count = 0
    texts: list[TextLoss] = []

    trained: Name
    steps: Count
    teacher: Name | None
    data: Text
    perplexity: Perplexities
    loss: list[Point]
    held_out_loss: list[Point]
    options: Options


class Manifest(_Fields):
    """`eigenslice.json`."""

    eigenslice: Name
    versions: dict[Name, Name] = {}
    model_type: Name
    form: Literal["stock", "custom"]
    warning: Name = ""
    basis: Literal["global", "per-block"]
    plan: Plan
    dense_width: Size
    dense_neurons: Count | None = None
    dense_heads: Count = 0
    dense_experts: Count = 0
    dense_query_heads: Count = 0
    dense_blocks: Count = 0
    site_widths: Annotated[list[Size], Field(min_length=1)]
    tied: bool
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    parameters: Parameters
    source: Source
    calibration: Text
    vocabulary: Vocabulary | None = None
    options: Options
    precision: dict[Name, Name] = {}
    spectra: list[Site]
    refit_errors: list[Fit] | None = None
    loss: Loss | NotMeasured | None = None
    finetune: Training | None = None
    run: dict[str, Any] = {}


def check(content: Any) -> None:
    """Refuse anything but a manifest.

    Raises:
        ValueError: a field is missing or of another kind (pydantic's ValidationError names the first one).
    """
    Manifest.model_validate(content)
    if "finetune" in content and content["finetune"] is None:
        raise ValueError("finetune: it holds nothing")
