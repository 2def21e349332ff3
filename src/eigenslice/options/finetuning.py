"""Options of `eigenslice finetune`."""

import math
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration_text import MOST_SAMPLES, CalibrationOptions
from eigenslice.options.common import GPU, ShardGib, TrustCheckpoints
from eigenslice.options.flags import ADAPTERS, MACHINE, OUTPUT, TEXT, TRAINING, Nested, Option, Options, Range
from eigenslice.options.paths import UserPath
from eigenslice.options.slicing import OWN_SHARE, SHARES

LORA_RATE, FULL_RATE = 1e-3, 0.05
"""Default learning rates: of adapters; of all weights, times the hidden width.

AdamW changes each weight by about the rate in a step, whatever the gradient. So an output changes by the rate times the
number of inputs. Both rates were measured with steps of `BATCH` windows. For fewer windows they fall as the root of
their number, as the noise of their gradient grows.
"""
BATCH, STEPS = 4, 1024
"""Default number of windows in a step, where the training then has so many steps. A step of one window at half the rate
gains more per token than a step of four (benchmarks/EXPERIMENTS.md)."""
DISTILL = 0.8
"""Share of the distillation beside a teacher. benchmarks/EXPERIMENTS.md compares it with smaller and larger shares."""
LOGGERS = ("tensorboard", "trackio")
WeightsPlace = Literal["device", "shared", "host"]
"""Where weights lie in a training: whole on each device; shared among the devices; or on the host, from which a block
comes to the device when it runs."""
HELD_OUT = 16
"""Default number of windows of texts that are held out."""
TRAINING_TEXT: dict[str, Option | None] = {
    "data": Option("Text to train on, as slice's --calibration.", TEXT, flags=("--calibration", "--data")),
    "field": Option("Text field of records, as slice's --field.", TEXT, "text, or else a conversation"),
    "samples": Option("Windows to train on.", TEXT),
    "seqlen": Option("Tokens per window.", TEXT),
    "seed": Option("Seed of sampling, adapters and order.", TEXT),
}
"""Options of the text, in the words of training."""


class FinetuneOptions(Options):
    """All options of recovery fine-tuning."""

    model: Annotated[str, Option("A folder that eigenslice wrote, or a hub id of one.", argument=True)]
    output: Annotated[UserPath, Option("Folder to write; must not exist.", flags=("--output", "-o"))]
    teacher: Annotated[
        str | None,
        Option("The dense model, to distil from (recovers most).", TRAINING, "train on the next token alone"),
    ] = None
    distill: Annotated[
        float | None,
        Option(
            "Share of the distillation in the loss; the rest is the next token's.",
            TRAINING,
            f"{DISTILL} with --teacher",
        ),
        Range(0, 1, "0 (next token only) to 1 (distillation only), beside --teacher"),
    ] = None
    full: Annotated[
        bool | None,
        Option("Train all weights; --no-full trains LoRA adapters.", ADAPTERS, "all weights, if the memory is enough"),
    ] = None
    rank: Annotated[int, Option("Rank of the adapters.", ADAPTERS), Range(1, 65536, "1 to 65536")] = 32
    alpha: Annotated[
        float,
        Option("Numerator of the adapters' scale, which is alpha / rank.", ADAPTERS),
        Range(1e-6, 1e6, "0.000001 to 1000000"),
    ] = 32.0
    dropout: Annotated[
        float, Option("Dropout of the adapters.", ADAPTERS), Range(0, 0.99, "at least 0 and less than 1")
    ] = 0.0
    keep_adapter: Annotated[
        bool, Option("Store the adapter beside the unchanged weights instead of merging it.", ADAPTERS)
    ] = False
    data: Annotated[CalibrationOptions, Nested(TRAINING_TEXT)] = CalibrationOptions(samples=400, seqlen=1024)
    tokens: Annotated[
        int | None,
        Option(
            "Tokens to train on, with the model's own text, in place of --samples and --epochs; short texts repeat.",
            TEXT,
            "--epochs passes over --samples windows",
        ),
        Range(1, 10**12, "1 to 10^12 tokens"),
    ] = None
    own_text: Annotated[
        float | None,
        Option(
            "Windows that the teacher writes, as a share of the texts' windows.", TEXT, f"{OWN_SHARE} with --teacher"
        ),
        SHARES,
    ] = None
    chat: Annotated[
        bool,
        Option(
            "Write records with instructions and answers in the model's chat template.", TEXT, "if it has a template"
        ),
    ] = True
    epochs: Annotated[float, Option("Passes over the windows.", TRAINING), Range(1e-6, 1e6, "0.000001 to 1000000")] = (
        1.0
    )
    batch: Annotated[
        int | None,
        Option("Windows per step, over all devices.", TRAINING, f"{BATCH}, or fewer, so that there are {STEPS} steps"),
        Range(1, 10**6, "1 to 1000000 windows"),
    ] = None
    micro_batch: Annotated[
        int,
        Option("Windows at once on one device.", MACHINE),
        Range(1, 10**6, "at least 1 window, at most --batch"),
    ] = 1
    learning_rate: Annotated[
        float | None,
        Option(
            "Highest learning rate.",
            TRAINING,
            f"{FULL_RATE} / hidden width for all weights, {LORA_RATE} for adapters; less for batches under {BATCH}",
        ),
        Range(1e-12, 1e3, "more than 0, at most 1000"),
    ] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"],
        Option("Course of the learning rate after the warm-up.", TRAINING),
    ] = "cosine"
    warmup: Annotated[
        float,
        Option("Share of the steps in which the learning rate rises.", TRAINING),
        Range(0, 0.99, "at least 0 and less than 1"),
    ] = 0.05
    weight_decay: Annotated[float, Option("Weight decay of AdamW.", TRAINING), Range(0, 1e3, "0 to 1000")] = 0.0
    held_out: Annotated[
        int | None,
        Option(
            "Windows of the same texts to measure instead of training on them.",
            TEXT,
            f"{HELD_OUT}, or an eighth of few windows",
        ),
        Range(1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} windows"),
    ] = None
    evaluate_every: Annotated[
        int | None,
        Option("Steps between measurements and checkpoints.", TRAINING, "at least a tenth of the run"),
        Range(1, 10**9, "1 to 10^9 steps"),
    ] = None
    patience: Annotated[
        int | None,
        Option("Stop after so many measurements without a gain.", TRAINING, "train to the end"),
        Range(1, 10**9, "1 to 10^9"),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option("Dtype to compute in.", MACHINE, "bfloat16 on GPUs and CPUs that multiply it, else float32"),
    ] = None
    device: Annotated[Literal["cpu", "cuda"] | None, Option("Device to train on.", MACHINE, GPU)] = None
    place: Annotated[
        WeightsPlace | None,
        Option(
            "Where the weights lie: on each `device` as a whole, `shared` among the processes' devices (FSDP2), or on "
            "the `host`, from which each block comes when it runs.",
            MACHINE,
            "the first of these that they fit into",
        ),
    ] = None
    checkpoint_activations: Annotated[
        bool, Option("Recompute activations in the backward pass: less memory, a third more time.", MACHINE)
    ] = False
    resume: Annotated[bool, Option("Go on with an interrupted run of the same command.", MACHINE)] = False
    log_to: Annotated[
        tuple[str, ...],
        Option("Loggers: tensorboard (into OUTPUT.logs), trackio; may be repeated.", OUTPUT, "none"),
    ] = ()
    shard_gib: ShardGib = 5.0
    trust_remote_code: TrustCheckpoints = False

    @model_validator(mode="after")
    def _check(self) -> "FinetuneOptions":
        if self.distill is not None and self.teacher is None:
            raise OptionsError(
                f"--distill {self.distill} without --teacher",
                allowed="--distill beside --teacher",
                next_step="pass the dense model as --teacher, or leave --distill out",
            )
        if self.own_text and self.teacher is None:
            raise OptionsError(
                f"--own-text {self.own_text} without --teacher",
                allowed="--own-text beside --teacher, which writes the text",
                next_step="pass the dense model as --teacher, or leave --own-text out",
            )
        if self.full and self.keep_adapter:
            raise OptionsError(
                "--full with --keep-adapter",
                allowed="one of them: full training has no adapter",
                next_step="drop one of them",
            )
        if self.batch is not None and self.batch % self.micro_batch:
            raise OptionsError(
                f"--batch {self.batch} --micro-batch {self.micro_batch}",
                allowed="a batch that is a multiple of the micro-batch",
                next_step="change one of them",
            )
        self._check_packages()
        return self

    def _check_packages(self) -> None:
        unknown = [name for name in self.log_to if name not in LOGGERS]
        needed = [*self.log_to, *(["peft"] if self.full is False or self.keep_adapter else [])]
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

    def with_batch(self, windows: float, processes: int, width: int) -> "FinetuneOptions":
        """Return the options with the batch and the learning rate decided, where `full` is.

        Args:
            windows: Windows in all steps together.
            processes: Processes that share a step.
            width: The model's hidden width.
        """
        share = self.micro_batch * processes
        batch = self.batch or max(1, min(BATCH, int(windows) // STEPS) // share) * share
        usual = FULL_RATE / width if self.full else LORA_RATE
        rate = self.learning_rate or usual * min(1.0, math.sqrt(batch / BATCH))
        return self.model_copy(update={"batch": batch, "learning_rate": rate})

    @property
    def own_share(self) -> float:
        """Windows that the teacher writes, as a share of the texts' windows."""
        return (OWN_SHARE if self.own_text is None else self.own_text) if self.teacher else 0.0

    @property
    def text_windows(self) -> int:
        """Number of the texts' windows to train on."""
        if self.tokens is None:
            return self.data.samples
        return max(len(self.data.data), math.ceil(self.tokens / (1 + self.own_share) / self.data.seqlen))


RECIPES: dict[str, dict[str, Any]] = {
    # SliceGPT, section 4 (r, alpha, length); the rest are arguments of the authors' run_finetuning.py
    "paper": {
        "data": CalibrationOptions(data="alpaca", samples=8000, seqlen=1024),
        "full": False,
        "own_text": 0.0,
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
    """Return the options of a recipe, with the user's options in their place.

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
