"""`eval --generate` on the command line: the table, the JSON, and options that don't go together."""

from pathlib import Path

from eigenslice.evaluation.generation import evaluate_generation
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.generating import GenerationOptions
from tests.cli.conftest import Command, Failure


def test_figures_are_printed_as_a_table_and_as_json(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    sliced = tmp_path / "sliced"
    assert command("slice", model, "-o", sliced, "--width", 24, "--calibration", text, "--seqlen", 20, "-q").code == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w5 w6\nw7 w8 w9\n")
    arguments = ["--generate", prompts, "--new", 12, "--seed", 3, "--prompt-tokens", 2, "--device", "cpu"]
    printed = command("eval", model, sliced, *arguments, "--json", "-q").json
    expected = evaluate_generation(
        [str(model), str(sliced)],
        GenerationOptions(text=CalibrationOptions(data=str(prompts)), new=12, seed=3, prompt_tokens=2, device="cpu"),
    )
    assert printed == expected
    table = command("eval", model, sliced, *arguments, "-q").out
    first, second = printed["models"]
    assert f"{100 * first['greedy']['repeated']:.1f} %" in table
    ratio = second["sampled"]["dense_perplexity"] / first["sampled"]["dense_perplexity"]
    assert f"{second['sampled']['dense_perplexity']:.2f} (x{ratio:.3f})" in table
    assert f"{second['agreement']['mean']:.1f}" in table
    assert "2 prompts, up to 12 tokens after each" in table
    assert "sliced" in table


def test_one_measurement_a_run(fails: Failure, model: Path, text: Path) -> None:
    assert "--generate with --data" in fails("eval", model, "--data", text, "--generate", "builtin")
    assert "--tasks with --generate" in fails("eval", model, "--tasks", "piqa", "--generate", "builtin")
    assert "--tasks with --data" in fails("eval", model, "--data", text, "--tasks", "piqa")


def test_prompts_and_numbers_that_are_refused(fails: Failure, model: Path, tmp_path: Path) -> None:
    assert "none.txt doesn't exist" in fails("eval", model, "--generate", tmp_path / "none.txt")
    assert "--prompts 0" in fails("eval", model, "--generate", "builtin", "--prompts", 0)
    assert "--prompt-tokens 0" in fails("eval", model, "--generate", "builtin", "--prompt-tokens", 0)
    assert "--new 64 after a prompt of" in fails("eval", model, "--generate", "builtin")
    assert "weights" in fails("eval", model, "--generate", model / "model.safetensors")
