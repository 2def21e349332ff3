"""Options of `eigenslice slice`."""

import math
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.common import Device, DtypeName, ShardGib, TrustTokenizer
from eigenslice.options.effort import Effort, effort_text, with_effort
from eigenslice.options.flags import CALIBRATION, MACHINE, RESULT, SIZE, Nested, Option, Options, Range
from eigenslice.options.paths import UserPath

OWN_SHARE = 0.5
"""Sequences of the model's own text that join calibration texts, as a share of the texts' sequences."""
RANDOM_SHARE = 0.25
"""Sequences of random tokens that join calibration texts where there is no text of the model's own, as a share."""
SHARES = Range(0, 4, "0 (none) to 4 (four times as many sequences as of text)")
KEPT = "for example --keep 0.75, for 75 % of the parameters"


class SliceOptions(Options):
    """All options of slicing. Exactly one of keep, slicing, width and recipe is given."""

    model: Annotated[str, Option("A folder, a hub id or a .gguf file.", argument=True)]
    output: Annotated[UserPath, Option("Folder to write; must not exist.", flags=("--output", "-o"))]
    keep: Annotated[
        float | None,
        Option("Share of the stored parameters to keep, such as 0.75. Tied weights count once.", SIZE),
        Range(math.nextafter(0, 1), 1, "more than 0 and at most 1", KEPT),
    ] = None
    slicing: Annotated[
        float | None,
        Option("The paper's measure: share of the hidden width to cut.", SIZE),
        Range(
            0,
            math.nextafter(1, 0),
            "at least 0 and less than 1",
            "for example --slicing 0.25, which cuts a quarter of the hidden width",
        ),
    ] = None
    width: Annotated[int | None, Option("Hidden width to keep.", SIZE)] = None
    effort: Annotated[
        Effort,
        Option(
            f"Time against quality, for options that are left out. fast, for a first look: {effort_text('fast')}. "
            f"best, for what you publish: {effort_text('best')}.",
            SIZE,
        ),
    ] = "default"
    recipe: Annotated[
        UserPath | None,
        Option(
            "Plan from a file: an eigenslice.json, or YAML with width, neurons, experts, key_value_heads, "
            "query_heads, dropped_blocks, tied, basis.",
            SIZE,
        ),
    ] = None
    neurons: Annotated[
        int | None,
        Option("MLP neurons (of each expert) to keep in every block, with --width or --slicing.", SIZE, "all"),
    ] = None
    experts: Annotated[
        int | None,
        Option("Experts to keep in every mixture, with --width, --slicing or --neurons, or alone.", SIZE, "all"),
    ] = None
    mlp: Annotated[bool, Option("With --keep: cut MLP neurons, too; --no-mlp cuts the width only.", SIZE)] = True
    heads: Annotated[
        bool,
        Option("With --keep: cut heads, too: key/value heads with their query heads, or query heads alone.", SIZE),
    ] = True
    depth: Annotated[bool, Option("With --keep: leave out whole blocks, too.", SIZE)] = True
    trials: Annotated[
        bool,
        Option(
            "With --keep: try several splits of the cut, and take the best one. --no-trials cuts MLP neurons alone, as "
            "many in each block, or the width where there are too few neurons.",
            SIZE,
        ),
    ] = True
    vocabulary: Annotated[
        int | None,
        Option(
            "Tokens to keep: the most used ones on the calibration text, or on --vocabulary-from; special and added "
            "tokens, bytes and letters always stay.",
            SIZE,
            "all",
        ),
        Range(1, 2**31 - 1, "1 to the number of tokens that the tokenizer has"),
    ] = None
    vocabulary_from: Annotated[
        str | tuple[str, ...],
        Option(
            "Keep only the tokens that these texts need (as --calibration takes them; several: repeat it). Other text "
            "is still encoded, with more tokens.",
            SIZE,
            "all tokens",
        ),
    ] = ()
    basis: Annotated[
        Literal["global", "per-block"],
        Option("One basis for all sites, or one for each site with shortcuts (the paper).", RESULT),
    ] = "global"
    refit: Annotated[
        bool | None,
        Option("Fit sliced weights to the dense model's activations.", RESULT, "yes with a global basis"),
    ] = None
    fit_neurons: Annotated[bool, Option("Fit the inputs of MLP neurons, too, where weights are fitted.", RESULT)] = True
    untie: Annotated[bool, Option("Store embedding and head separately, even if the model ties them.", RESULT)] = False
    own_text: Annotated[
        float | None,
        Option(
            "Sequences of text that the model writes itself, as a share of the texts' sequences. The model is loaded "
            "as a whole for it.",
            CALIBRATION,
            f"{OWN_SHARE}, if the whole model takes at most half of the free memory",
        ),
        SHARES,
    ] = None
    random_tokens: Annotated[
        float | None,
        Option(
            "Sequences of random tokens to fit on, as a share of the texts' sequences: they show the whole vocabulary.",
            CALIBRATION,
            f"{RANDOM_SHARE} without text of the model's own, else 0",
        ),
        SHARES,
    ] = None
    heal: Annotated[
        int | None,
        Option(
            "Tokens to train on after slicing, so that the result predicts what the dense model predicts: calibration "
            "text, and text that the dense model writes.",
            RESULT,
            "no training",
        ),
        Range(1, 10**12, "1 to 10^12 tokens", "100000 take about as long as slicing; 1000000 recover most"),
    ] = None
    multiple: Annotated[
        int,
        Option("--slicing and --keep choose multiples of this: 8, or 32 (Q8_0) or 256 (K-quants).", SIZE),
        Range(1, 4096, "1 to 4096", "8, the default, 32, 64 and 256 are usual"),
    ] = 8
    portable: Annotated[bool, Option("Only what llama.cpp and vLLM are known to run, or an error.", RESULT)] = False
    form: Annotated[
        Literal["auto", "stock", "custom"],
        Option(
            "Save as a stock config of transformers, or as eigenslice's class; auto: stock if one can hold it.", RESULT
        ),
    ] = "auto"
    calibration: Annotated[CalibrationOptions, Nested()] = CalibrationOptions()
    dtype: Annotated[DtypeName | None, Option("Stored dtype.", RESULT, "as the source")] = None
    compute_dtype: Annotated[
        DtypeName | None,
        Option(
            "Dtype of the forward pass; float32: without bfloat16 in products, too.",
            MACHINE,
            "float32 on CPU, bfloat16 in products if it has them; the source's on a GPU, bfloat16 of a GGUF",
        ),
    ] = None
    device: Device = None
    offload: Annotated[
        Literal["auto", "none", "disk"],
        Option(
            "Where calibration activations live: none is on the device, disk in files, auto where they fit.", MACHINE
        ),
    ] = "auto"
    shard_gib: ShardGib = 5.0
    resume: Annotated[bool, Option("Go on with an interrupted run of the same command.", MACHINE)] = False
    trust_remote_code: TrustTokenizer = False

    @model_validator(mode="before")
    @classmethod
    def _set_by_effort(cls, given: Any) -> Any:
        return with_effort(given) if isinstance(given, dict) else given

    @field_validator("vocabulary_from", mode="after")
    @classmethod
    def _as_tuple(cls, value: str | tuple[str, ...]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "SliceOptions":
        given = [f"--{n}" for n in ("keep", "slicing", "width", "recipe") if getattr(self, n) is not None]
        if len(given) != 1 and (given or self.experts is None):
            raise OptionsError(
                " and ".join(given) + " together" if given else "no size was given",
                allowed="exactly one of --keep, --slicing, --width and --recipe",
                next_step=KEPT,
            )
        if self.neurons is not None and (self.keep is not None or self.recipe is not None or not self.mlp):
            raise OptionsError(
                f"--neurons {self.neurons} with --keep, --recipe or --no-mlp",
                allowed="--neurons beside --width or --slicing: --keep and --recipe say themselves how many to keep",
                next_step="drop one of them",
            )
        if self.experts is not None and (self.keep is not None or self.recipe is not None):
            raise OptionsError(
                f"--experts {self.experts} with --keep or --recipe",
                allowed="--experts alone, or beside --width, --slicing or --neurons: --keep and --recipe say "
                "themselves how many to keep",
                next_step="drop one of them",
            )
        if self.portable and (self.form == "custom" or self.basis == "per-block"):
            raise OptionsError(
                "--portable with --form custom or --basis per-block",
                allowed="--portable with stock results, which other runtimes read",
                next_step="drop one of them",
            )
        if self.refit and self.basis == "per-block":
            raise OptionsError(
                "--refit with --basis per-block",
                allowed="--refit with --basis global; per-block is the paper's algorithm, which has none",
                next_step="drop one of them",
            )
        return self

    @property
    def cuts_vocabulary(self) -> bool:
        """True if tokens are left out."""
        return self.vocabulary is not None or bool(self.vocabulary_from)

    @property
    def fits(self) -> bool:
        """True if sliced weights are refitted."""
        return self.basis == "global" if self.refit is None else self.refit
