"""What the user can choose: one frozen object, the source of the flags' defaults and of the manifest."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration import CalibrationOptions
from eigenslice.options.common import SHARD_GIB, DtypeName
from eigenslice.options.paths import UserPath
from eigenslice.options.ranges import check_ranges

OWN_SHARE = 0.5
"""Sequences of the model's own text that join calibration texts, as a share of those; where there are none, ..."""
RANDOM_SHARE = 0.25
"""... sequences of random tokens."""


class SliceOptions(BaseModel):
    """Everything that decides what a sliced model looks like.

    Attributes:
        model: A folder, a hub id or a .gguf file.
        output: The folder to write; must not exist.
        keep: Share of the dense model's stored parameters to keep, 0 < keep <= 1.
        slicing: The paper's measure: the share of the hidden width to cut, 0 <= slicing < 1.
        width: The hidden width to keep.
        recipe: A file with a plan: an eigenslice.json, or YAML with width, neurons, key_value_heads,
            dropped_blocks, tied, basis.
        neurons: MLP neurons to keep in every block, or expert, with slicing or width; None keeps all.
        mlp: Whether keep may cut MLP neurons (global basis).
        heads: Whether keep may cut key/value heads, each with its query heads (global basis, with refit).
        depth: Whether keep may leave out whole blocks, where all are alike (global basis, with refit).
        basis: One basis for all sites, or one for each with shortcuts (the paper).
        refit: Fit the sliced weights to the dense model's activations, in closed form; None is yes with a global
            basis. Per-block is the paper's algorithm, which has none.
        own_text: Sequences of text that the model writes itself, to calibrate on beside texts, as a share of those; the
            model is loaded as a whole for it. None is 0.5, unless that takes more memory than slicing. Token ids are
            used as they are.
        random_tokens: Sequences of random tokens to fit on beside texts, as such a share, so that every part of the
            vocabulary is seen; None is 0.25 where there is no text of the model's own, else 0.
        untie: Store embedding and head separately even if the dense model ties them.
        multiple: Widths and neurons that slicing and keep choose are multiples of this. Matrix kernels like 8;
            llama.cpp's Q8_0 wants 32 and its K-quants 256.
        portable: Only forms that llama.cpp and vLLM are known to run; slicing and keep choose multiples of the number
            of heads then.
        form: auto (stock if a config can hold the result), stock or custom.
        calibration: See `CalibrationOptions`.
        dtype: Stored dtype; None is the checkpoint's.
        compute_dtype: Dtype of the forward pass; None is float32 on CPU and the checkpoint's on a GPU.
        device: torch device; None is a GPU if there is one.
        offload: Where calibration activations live: auto (the device, else host memory, else files), none (the
            device), disk (files).
        shard_gib: Size of an output file, in GiB.
        resume: Go on with a run that was interrupted, if there is one.
        trust_remote_code: Let the tokenizer run code from the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: UserPath
    keep: float | None = None
    slicing: float | None = None
    width: int | None = None
    recipe: UserPath | None = None
    neurons: int | None = None
    mlp: bool = True
    heads: bool = True
    depth: bool = True
    basis: Literal["global", "per-block"] = "global"
    refit: bool | None = None
    untie: bool = False
    own_text: float | None = None
    random_tokens: float | None = None
    multiple: int = 8
    portable: bool = False
    form: Literal["auto", "stock", "custom"] = "auto"
    calibration: CalibrationOptions = CalibrationOptions()
    dtype: DtypeName | None = None
    compute_dtype: DtypeName | None = None
    device: str | None = None
    offload: Literal["auto", "none", "disk"] = "auto"
    shard_gib: float = 5.0
    resume: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "SliceOptions":
        given = [f"--{n}" for n in ("keep", "slicing", "width", "recipe") if getattr(self, n) is not None]
        if len(given) != 1:
            raise OptionsError(
                " and ".join(given) + " together" if given else "no size was given",
                allowed="exactly one of --keep, --slicing, --width and --recipe",
                next_step="for example --keep 0.75, for 75 % of the parameters",
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionsError(
                f"--keep {self.keep}",
                allowed="more than 0 and at most 1",
                next_step="for example --keep 0.75, for 75 % of the parameters",
            )
        if self.slicing is not None and not 0 <= self.slicing < 1:
            raise OptionsError(
                f"--slicing {self.slicing}",
                allowed="at least 0 and less than 1",
                next_step="for example --slicing 0.25, which cuts a quarter of the hidden width",
            )
        if self.neurons is not None and (self.keep is not None or self.recipe is not None or not self.mlp):
            raise OptionsError(
                f"--neurons {self.neurons} with --keep, --recipe or --no-mlp",
                allowed="--neurons beside --width or --slicing: --keep and --recipe say themselves how many to keep",
                next_step="drop one of them",
            )
        if not 1 <= self.multiple <= 4096:
            raise OptionsError(
                f"--multiple {self.multiple}", allowed="1 to 4096", next_step="8, the default, 32, 64 and 256 are usual"
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
        for name, share in (("own-text", self.own_text), ("random-tokens", self.random_tokens)):
            if share is not None and not 0 <= share <= 4:
                raise OptionsError(
                    f"--{name} {share}",
                    allowed="0 (none) to 4 (four times as many sequences as of text)",
                    next_step="leave it out for the default",
                )
        check_ranges(self, {"shard_gib": SHARD_GIB})
        return self

    @property
    def fits(self) -> bool:
        """Whether sliced weights are refitted."""
        return self.basis == "global" if self.refit is None else self.refit
