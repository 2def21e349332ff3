"""JSON that a report draws: the output of other verbs, checked before anything is drawn."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from eigenslice.errors import OptionsError, first_line
from eigenslice.report.manifest_fields import Count, Name
from eigenslice.runtime.reading import MIB, read_json

LARGEST = 64 * MIB
"""Bytes; lm-eval's results hold every task's whole configuration."""
MOST_ROWS = 1000
Finite = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Measured(_Fields):
    """The text of a perplexity."""

    data: Name


class Perplexity(_Fields):
    """One of `eval --json`."""

    model: Name
    perplexity: Positive
    data: Measured


class Ratio(_Fields):
    """Over the dense model's."""

    ratio: Positive | None


class QualityRow(_Fields):
    """One of benchmarks/quality.py that was measured."""

    method: Name
    kept: Positive
    tests: dict[Name, Ratio]


class Failure(_Fields):
    """One that wasn't."""

    error: str


class Quality(_Fields):
    """benchmarks/quality.py."""

    tests: dict[Name, Any] | list[Name]
    rows: Annotated[list[Failure | QualityRow], Field(min_length=1, max_length=MOST_ROWS)]


class Score(_Fields):
    """A score of a task."""

    task: Name
    metric: Name
    value: Finite
    stderr: Finite | None


class Asked(_Fields):
    """A model that was asked."""

    model: Name
    scores: Annotated[list[Score], Field(min_length=1, max_length=MOST_ROWS)]


class Tasks(_Fields):
    """`eval --tasks --json`."""

    models: Annotated[list[Asked], Field(min_length=1, max_length=MOST_ROWS)]


Share = Annotated[float, Field(ge=0, le=1)]


class Greedy(_Fields):
    """Greedy text of a model."""

    repeated: Share | None


class Sampled(Greedy):
    """Sampled text of a model."""

    dense_perplexity: Annotated[float, Field(ge=1, le=1e30)]


class Agreement(_Fields):
    """Tokens before two texts differ."""

    mean: Finite
    median: Finite


class Written(_Fields):
    """A model that wrote."""

    model: Name
    greedy: Greedy
    sampled: Sampled
    agreement: Agreement | None


class WritingSettings(_Fields):
    """Settings of the writing."""

    new: Count


class Writing(_Fields):
    """`eval --generate --json`."""

    settings: WritingSettings
    prompts: Count
    models: Annotated[list[Written], Field(min_length=1, max_length=MOST_ROWS)]


class Spread(_Fields):
    """Over runs."""

    median: Positive
    low: Positive
    high: Positive


class Gain(_Fields):
    """A speed-up."""

    measured: Positive
    ideal: Positive


class Gains(_Fields):
    """Gains of both phases."""

    prefill: Gain
    decode: Gain


class Timed(_Fields):
    """A model that was timed."""

    model: Name
    disk_bytes: Count
    peak_bytes: Count | None
    first_token: Spread
    prefill: Spread
    decode: Spread
    speedup: Gains = Gains.model_construct()


class BenchSettings(_Fields):
    """Settings of a measurement."""

    batch: Count
    prompt: Count
    new: Count
    runs: Count
    compile: bool


class Environment(_Fields):
    """The machine of a measurement."""

    device: Name
    threads: Count
    dtypes: list[Name]


class Bench(_Fields):
    """`bench --json`."""

    settings: BenchSettings
    environment: Environment
    models: Annotated[list[Timed], Field(min_length=1, max_length=MOST_ROWS)]


KINDS: dict[str, tuple[TypeAdapter[Any], str]] = {
    "perplexity": (
        TypeAdapter(Annotated[list[Perplexity], Field(min_length=1, max_length=MOST_ROWS)] | Quality),
        "`eigenslice eval --json` or benchmarks/quality.py",
    ),
    "tasks": (TypeAdapter(Tasks), "`eigenslice eval --tasks ... --json`"),
    "writing": (TypeAdapter(Writing), "`eigenslice eval --generate ... --json`"),
    "bench": (TypeAdapter(Bench), "`eigenslice bench ... --json`"),
}


def read_input(option: str, path: Path | None) -> Any:
    """The content of a file that an option names; None without one.

    Args:
        option: perplexity, tasks, writing or bench.
        path: The file.

    Raises:
        OptionsError: the file can't be read, or holds something else.
    """
    if path is None:
        return None
    adapter, command = KINDS[option]
    try:
        content = read_json(path, LARGEST)
        adapter.validate_python(content)
        if option == "bench" and not all("speedup" in row for row in content["models"][1:]):
            raise ValueError("a model behind the first has no speedup")
    except (OSError, ValueError) as error:
        kind = "this JSON is not what it should be" if isinstance(error, ValidationError) else "it can't be read"
        raise OptionsError(
            f"--{option} {path}: {kind} ({first_line(error)})",
            allowed=f"the output of {command}",
            next_step="check the path, or write the file again",
        ) from error
    return content
