"""What can be chosen for recovery fine-tuning."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration import MOST_SAMPLES, CalibrationOptions
from eigenslice.options.common import SHARD_GIB
from eigenslice.options.paths import UserPath
from eigenslice.options.ranges import Limits, check_ranges

LORA_RATE, FULL_RATE = 1e-3, 3e-4
"""Default learning rates."""
DISTILL = 0.8
"""Share of the distillation beside a teacher. Measured, as what it is on either side, in benchmarks/EXPERIMENTS.md."""
LOGGERS = ("tensorboard", "trackio")


class FinetuneOptions(BaseModel):
    """Everything that decides what recovery fine-tuning does.

    Attributes:
        model: A folder that `slice` or `finetune` wrote, or a hub id of one.
        output: The folder to write; must not exist.
        teacher: The dense model to distil from; None trains on the next token alone.
        distill: Share of the distillation in the loss, the rest is the next token's; None is `DISTILL` with a teacher.
        full: Train all weights instead of adapters.
        rank, alpha, dropout: Of the LoRA adapters (arXiv 2106.09685); what they add is scaled by alpha / rank.
        keep_adapter: Store the adapter beside the unchanged weights instead of merging it.
        data: What to train on; `samples` windows of `seqlen` tokens.
        chat: Write records with instructions and answers in the model's chat template, if it has one.
        epochs: Passes over the data.
        batch: Windows per optimizer step, over all devices.
        micro_batch: Windows at once on one device.
        learning_rate: Highest one; None is `LORA_RATE` or `FULL_RATE`.
        schedule: How the rate falls after the warm-up.
        warmup: Share of the steps in which it rises.
        weight_decay: AdamW's.
        held_out: Windows, of the same texts, that are measured and not trained on.
        evaluate_every: Steps between two measurements and checkpoints; None is a tenth of the run.
        patience: Measurements without a gain after which to stop; None trains to the end.
        dtype: float32, or bfloat16 by autocast; None is float32 on CPU and bfloat16 on a GPU that has it.
        device: cpu or cuda; None is a GPU if there is one.
        checkpoint_activations: Recompute activations in the backward pass: less memory, a third more time.
        resume: Go on from the checkpoints of an interrupted run with the same options.
        log_to: Loggers: tensorboard (into the folder OUTPUT.logs) and trackio.
        shard_gib: Size of an output file, in GiB.
        trust_remote_code: Let the checkpoints run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: UserPath
    teacher: str | None = None
    distill: float | None = None
    full: bool = False
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    keep_adapter: bool = False
    data: CalibrationOptions = CalibrationOptions(samples=400, seqlen=1024)
    chat: bool = True
    epochs: float = 1.0
    batch: int = 4
    micro_batch: int = 1
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    held_out: int = 16
    evaluate_every: int | None = None
    patience: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    device: Literal["cpu", "cuda"] | None = None
    checkpoint_activations: bool = False
    resume: bool = False
    log_to: tuple[str, ...] = ()
    shard_gib: float = 5.0
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "FinetuneOptions":
        if self.distill is not None and (self.teacher is None or not 0 <= self.distill <= 1):
            raise OptionsError(
                f"--distill {self.distill}" + (" without --teacher" if self.teacher is None else ""),
                allowed="0 (next token only) to 1 (distillation only), beside --teacher",
                next_step="pass the dense model as --teacher, or leave --distill out",
            )
        if self.full and self.keep_adapter:
            raise OptionsError(
                "--full with --keep-adapter",
                allowed="one of them: full training has no adapter",
                next_step="drop one of them",
            )
        limits: Limits = {
            "rank": (1, 65536, "1 to 65536"),
            "alpha": (1e-6, 1e6, "0.000001 to 1000000"),
            "dropout": (0, 0.99, "at least 0 and less than 1"),
            "epochs": (1e-6, 1e6, "0.000001 to 1000000"),
            "batch": (1, 10**6, "1 to 1000000 windows"),
            "micro_batch": (1, self.batch, "at least 1 window, at most --batch"),
            "learning_rate": (1e-12, 1e3, "more than 0, at most 1000"),
            "warmup": (0, 0.99, "at least 0 and less than 1"),
            "weight_decay": (0, 1e3, "0 to 1000"),
            "held_out": (1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} windows"),
            "evaluate_every": (1, 10**9, "1 to 10^9 steps"),
            "patience": (1, 10**9, "1 to 10^9"),
            "shard_gib": SHARD_GIB,
        }
        check_ranges(self, limits)
        if self.batch % self.micro_batch:
            raise OptionsError(
                f"--batch {self.batch} --micro-batch {self.micro_batch}",
                allowed="a batch that is a multiple of the micro-batch",
                next_step="change one of them",
            )
        self._check_packages()
        return self

    def _check_packages(self) -> None:
        unknown = [name for name in self.log_to if name not in LOGGERS]
        needed = [*self.log_to, *([] if self.full else ["peft"])]
        missing = [name for name in needed if find_spec(name) is None]
        if unknown:
            raise OptionsError(
                f"--log-to {unknown[0]}", allowed=" or ".join(LOGGERS), next_step="choose one of them, or none"
            )
        if missing:
            raise OptionsError(
                f"{missing[0]} is not installed",
                allowed="an environment with the packages that the options need",
                next_step=f"pip install {'eigenslice[finetune]' if missing[0] == 'peft' else missing[0]}",
            )

    @property
    def distilled(self) -> float:
        """Share of the distillation in the loss."""
        return (DISTILL if self.distill is None else self.distill) if self.teacher else 0.0

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (FULL_RATE if self.full else LORA_RATE)


RECIPES: dict[str, dict[str, Any]] = {
    # SliceGPT, section 4 (r, alpha, length); the rest is what the authors' run_finetuning.py is called with
    "paper": {
        "data": CalibrationOptions(data="alpaca", samples=8000, seqlen=1024),
        "rank": 32,
        "alpha": 10.0,
        "dropout": 0.05,
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup": 0.15,
        "weight_decay": 0.01,
        "batch": 3,
        "held_out": 128,
        "chat": False,
    },
}


def with_recipe(name: str | None, given: dict[str, Any], data: dict[str, Any]) -> FinetuneOptions:
    """Options of a recipe with what the user gave in its place.

    Args:
        name: A key of `RECIPES`, or None for the defaults.
        given: Fields of `FinetuneOptions` that the user chose.
        data: Fields of `CalibrationOptions` that the user chose.

    Raises:
        OptionsError: there is no such recipe.
    """
    if name is not None and name not in RECIPES:
        raise OptionsError(f"--recipe {name}", allowed=", ".join(RECIPES), next_step="choose one of them, or none")
    chosen = RECIPES[name] if name else {}
    base = chosen.get("data", FinetuneOptions.model_fields["data"].default)
    values: dict[str, Any] = chosen | given | {"data": CalibrationOptions(**base.model_dump() | data)}
    return FinetuneOptions(**values)
