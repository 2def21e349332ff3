"""What slice, inspect, eval and sample print, against transformers loading the folders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

import eigenslice
from eigenslice.report import stated_loss
from tests import tiny, words
from tests.checkpoint.files import tensors_of
from tests.cli.conftest import Command
from tests.results import load


def stored_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in tensors_of(folder).values())


def perplexity_of(folder: Path, windows: list[list[int]]) -> tuple[float, int]:
    """Perplexity by transformers' own loss, window by window, and the number of tokens predicted."""
    model, total, count = load(folder, dtype=torch.float32), 0.0, 0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            total += float(model(ids, labels=ids).loss) * (len(window) - 1)
            count += len(window) - 1
    return math.exp(total / count), count


@pytest.fixture
def sliced(command: Command, model: Path, text: Path, tmp_path: Path) -> Callable[..., Any]:
    """Slices the tiny model on a text; gives the folder and what was printed as JSON."""

    def run(*arguments: object, source: Path = model) -> tuple[Path, Any]:
        output = tmp_path / "results" / "out"
        data = [] if "--calibration" in arguments else ["--calibration", text, "--seqlen", 20, "--samples", 20]
        outcome = command("slice", source, "-o", output, *data, "--json", *arguments)
        assert outcome.code == 0, outcome
        return output, outcome.json

    return run


def test_slice_prints_the_manifest(sliced: Callable[..., Any], model: Path) -> None:
    output, printed = sliced("--slicing", 0.25)
    assert printed == json.loads((output / "eigenslice.json").read_text())
    assert printed["eigenslice"] == eigenslice.__version__
    assert printed["source"]["name"] == str(model)
    assert (printed["model_type"], printed["form"], printed["basis"]) == ("llama", "stock", "global")
    assert (printed["dense_width"], set(printed["site_widths"])) == (32, {24})
    assert printed["calibration"]["tokens"] == 400
    assert printed["options"]["slicing"] == 0.25


def test_slice_writes_what_transformers_loads(sliced: Callable[..., Any], model: Path) -> None:
    output, printed = sliced("--width", 24)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    loaded = load(output)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config.hidden_size == 24
    assert sum(p.numel() for p in loaded.parameters()) == printed["parameters"]["stored"]
    assert AutoTokenizer.from_pretrained(output)("w7 w9")["input_ids"] == [7, 9]
    ids = tiny.random_ids(1, 6)
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 9)


def test_parameters_are_counted_as_stored(sliced: Callable[..., Any], model: Path) -> None:
    output, printed = sliced("--width", 24)
    sizes = printed["parameters"]
    assert sizes["dense"] == stored_parameters(model)
    assert sizes["stored"] == stored_parameters(output) == sum(sizes["by_role"].values())
    assert sizes["kept"] == pytest.approx(sizes["stored"] / sizes["dense"])


def test_keep_may_cut_neurons(sliced: Callable[..., Any]) -> None:
    output, printed = sliced("--keep", 0.6)
    sizes, plan = printed["parameters"], printed["plan"]
    assert sizes["stored"] == stored_parameters(output) <= 0.6 * sizes["dense"]
    assert plan | {"kl": min(trial["kl"] for trial in printed["trials"])} in printed["trials"]
    assert len(printed["trials"]) > 1
    config = AutoConfig.from_pretrained(output)
    assert (config.hidden_size, config.intermediate_size) == (plan["width"], plan["neurons"])
    assert plan["neurons"] < 56 or plan["width"] < 32


def test_keep_without_mlp_is_the_most_that_fits(sliced: Callable[..., Any]) -> None:
    output, printed = sliced("--keep", 0.6, "--no-mlp")
    sizes = printed["parameters"]
    assert AutoConfig.from_pretrained(output).intermediate_size == 56
    assert sizes["stored"] <= 0.6 * sizes["dense"]
    width = printed["site_widths"][0]
    wider = sum(size * (width + 8) / width for role, size in sizes["by_role"].items() if role != "norm")
    assert wider > 0.6 * sizes["dense"], "the next width would have fitted too"


def test_options_of_slice_arrive(sliced: Callable[..., Any]) -> None:
    output, printed = sliced(
        *("--width", 20, "--basis", "per-block", "--dtype", "float16", "--seed", 5, "--shard-size", 1e-5)
    )
    assert (printed["basis"], printed["form"], printed["model_type"]) == ("per-block", "custom", "eigenslice")
    assert printed["site_widths"] == [20] * 6 + [32]
    assert printed["calibration"]["seed"] == 5
    assert "shortcut" in printed["parameters"]["by_role"]
    assert len(list(output.glob("model-*.safetensors"))) > 2
    loaded = load(output, dtype="auto")
    assert loaded.dtype == torch.float16
    assert isinstance(loaded, eigenslice.SlicedForCausalLM)


def test_neurons_and_refit_arrive(sliced: Callable[..., Any]) -> None:
    output, printed = sliced("--width", 24, "--neurons", 40, "--no-refit")
    assert printed["plan"] == {"basis": "global", "width": 24, "neurons": 40, "tied": False}
    assert (printed["refitted"], printed["options"]["refit"], printed["options"]["neurons"]) == (False, False, 40)
    config = AutoConfig.from_pretrained(output)
    assert (config.hidden_size, config.intermediate_size) == (24, 40)


@pytest.mark.parametrize(("arguments", "refitted"), [([], True), (["--refit"], True), (["--no-refit"], False)])
def test_refit_is_the_default(arguments: list[str], refitted: bool, sliced: Callable[..., Any]) -> None:
    assert sliced("--width", 24, *arguments)[1]["refitted"] == refitted


def test_recipes_arrive(sliced: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("width: 24\nneurons: [40, 16, 56]\n")
    output, printed = sliced("--recipe", tmp_path / "recipe.yaml")
    assert printed["plan"]["neurons"] == [40, 16, 56]
    assert printed["options"]["recipe"] == str(tmp_path / "recipe.yaml")
    assert isinstance(load(output), eigenslice.SlicedForCausalLM)


def test_a_manifest_arrives_as_recipe(sliced: Callable[..., Any], tmp_path: Path) -> None:
    output, first = sliced("--keep", 0.6)
    output.rename(tmp_path / "first")
    _, second = sliced("--recipe", tmp_path / "first" / "eigenslice.json")
    assert (second["plan"], second["parameters"]) == (first["plan"], first["parameters"])


def test_several_texts_are_mixed(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"body": words.text(list(range(10, 40)) * 10)}]))
    (tmp_path / "b.txt").write_text(words.text(list(range(50, 80)) * 10))
    data = ["--calibration", tmp_path / "a.json", "--calibration", tmp_path / "b.txt", "--field", "body", "--field", ""]
    arguments = ["slice", model, "-o", tmp_path / "out", "--width", 24, "--seqlen", 20, "--samples", 11, "--json"]
    outcome = command(*arguments, *data)
    assert outcome.code == 0, outcome
    assert outcome.json["calibration"]["data"] == [
        {"data": "a.json", "sequences": 6},
        {"data": "b.txt", "sequences": 5},
    ]


def test_untie_and_form_arrive(
    sliced: Callable[..., Any], dense_folder: Callable[[str], Path], calibration: Path
) -> None:
    output, printed = sliced(
        *("--width", 24, "--untie", "--form", "custom", "--calibration", calibration),
        source=dense_folder("llama-tied"),
    )
    assert (printed["tied"], printed["form"]) == (False, "custom")
    assert not load(output).config.tie_word_embeddings


def test_the_seed_draws_the_windows(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    stored = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"out-{number}"
        data = ["--calibration", text, "--seqlen", 20, "--samples", 8, "--seed", seed]
        assert command("slice", model, "-o", output, "--width", 24, *data).code == 0
        stored.append(tensors_of(output)["model.embed_tokens.weight"])
    assert torch.equal(stored[0], stored[1])
    assert not torch.allclose(stored[0], stored[2])


def test_slice_sums_up_in_words(command: Command, model: Path, calibration: Path, tmp_path: Path) -> None:
    arguments = ["slice", model, "-o", tmp_path / "out", "--slicing", 0.25, "--calibration", calibration]
    outcome = command(*arguments)
    assert outcome.code == 0
    assert "width 32 -> 24, saved as llama (stock)" in outcome.out
    assert f"{100 * stored_parameters(tmp_path / 'out') / stored_parameters(model):.1f} %" in outcome.out


def test_the_last_line_of_slice_is_the_measured_loss(
    command: Command, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large loss is said with what to do; nothing is lost without a cut."""
    monkeypatch.setattr(stated_loss, "BOUND", 1.1)
    outcome = command("slice", model, "-o", tmp_path / "out", "--width", 8, "--calibration", calibration)
    loss = json.loads((tmp_path / "out" / "eigenslice.json").read_text())["loss"]
    assert loss["kl"] > math.log(1.1)
    assert outcome.out.splitlines()[-1].startswith(f"estimated loss: perplexity x{loss['perplexity_ratio']:.3f} (")
    assert f"KL {loss['kl']:.3f} nats per token" in outcome.out.splitlines()[-1]
    assert "much worse than the dense model" in outcome.err
    assert "--samples" in outcome.err
    whole = command("slice", model, "-o", tmp_path / "whole", "--width", tiny.WIDTH, "--calibration", calibration)
    assert "perplexity x1.000" in whole.out.splitlines()[-1]
    assert "much worse" not in whole.err


def test_slice_says_how_a_custom_result_is_loaded(
    command: Command, model: Path, calibration: Path, tmp_path: Path
) -> None:
    arguments = ["slice", model, "-o", tmp_path / "out", "--width", 24, "--basis", "per-block"]
    outcome = command(*arguments, "--calibration", calibration)
    assert outcome.code == 0
    assert "trust_remote_code=True" in outcome.err


def test_quiet_is_quiet(command: Command, model: Path, calibration: Path, tmp_path: Path) -> None:
    arguments = ["slice", model, "-o", tmp_path / "out", "--width", 24, "--calibration", calibration, "-q"]
    outcome = command(*arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_warnings_are_printed_and_the_work_goes_on(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["slice", model, "-o", tmp_path / "out", "--width", 24, "--calibration", text]
    outcome = command(*arguments, "--seqlen", 20, "--samples", 5, "--json")
    assert outcome.code == 0
    assert "warning: 100 calibration tokens are few for a width of 32" in outcome.err
    assert outcome.json["calibration"]["tokens"] == 100


@pytest.mark.parametrize("case", ["llama", "llama-tied", "opt", "phi", "gpt_neox"])
def test_inspect_tells_what_the_checkpoint_holds(
    case: str, command: Command, dense_folder: Callable[[str], Path]
) -> None:
    folder = dense_folder(case)
    outcome = command("inspect", folder, "--json")
    assert outcome.code == 0
    printed, model = outcome.json, load(folder)
    assert printed["model_type"] == model.config.model_type
    assert printed["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(printed["by_role"].values()) == printed["parameters"]
    assert (printed["width"], printed["blocks"], printed["dtype"]) == (32, 3, "float32")
    assert printed["tied"] == model.config.tie_word_embeddings
    assert printed["sites"] == (4 if case in ("phi", "gpt_neox") else 7)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert printed["by_role"]["norm"] == norms


@pytest.mark.parametrize("basis", ["global", "per-block"])
def test_inspect_foretells_what_slice_stores(
    basis: str, command: Command, sliced: Callable[..., Any], model: Path
) -> None:
    rows = command("inspect", model, "--json").json["sizes"]
    (row,) = (row for row in rows if (row["slicing"], row["basis"]) == (0.25, basis))
    output, printed = sliced("--slicing", 0.25, "--basis", basis)
    assert row["width"] == printed["site_widths"][0]
    assert row["parameters"] == stored_parameters(output)
    assert row["kept"] == pytest.approx(printed["parameters"]["kept"])
    assert row["saved_as"] == AutoConfig.from_pretrained(output).model_type
    assert row["tied"] == printed["tied"]


def test_inspect_sums_up_in_words(command: Command, model: Path) -> None:
    outcome = command("inspect", model)
    assert outcome.code == 0
    assert "supported (llama); 3 blocks, 7 sites of width 32, embedding and head separate" in outcome.out
    assert f"{stored_parameters(model):,}" in outcome.out


def test_eval_is_the_perplexity_of_transformers_own_loss(command: Command, model: Path, text: Path) -> None:
    ids = tiny.random_ids(1, 400)[0].tolist()
    windows = [ids[i : i + 30] for i in range(0, 400, 30)]  # the last one has 10 tokens
    outcome = command("eval", model, "--data", text, "--seqlen", 30, "--json")
    assert outcome.code == 0
    (row,) = outcome.json
    perplexity, count = perplexity_of(model, windows)
    assert row["tokens"] == count == 13 * 29 + 9
    assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert row["loss"] == pytest.approx(math.log(perplexity), rel=1e-4)
    assert row["model"] == str(model)
    assert row["data"]["sequences"] == 14


def test_eval_takes_as_many_windows_as_asked_for(command: Command, model: Path, text: Path) -> None:
    ids = tiny.random_ids(1, 400)[0].tolist()
    (row,) = command("eval", model, "--data", text, "--seqlen", 30, "--samples", 2, "--json").json
    perplexity, count = perplexity_of(model, [ids[:30], ids[30:60]])
    assert row["tokens"] == count
    assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_eval_compares_dense_and_sliced(
    command: Command, sliced: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    output, _ = sliced("--width", 24, "--basis", "per-block")
    ids = tiny.random_ids(5, 16, seed=8)
    save_file({"held_out": ids}, tmp_path / "ids.safetensors")
    arguments = ["eval", model, output, "--data", tmp_path / "ids.safetensors", "--field", "held_out"]
    rows = command(*arguments, "--json").json
    assert [row["model"] for row in rows] == [str(model), str(output)]
    for row, folder in zip(rows, (model, output), strict=True):
        assert row["perplexity"] == pytest.approx(perplexity_of(folder, ids.tolist())[0], rel=1e-4)
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    lines = command(*arguments).out.splitlines()
    assert f"perplexity {rows[0]['perplexity']:.4f}  x1.000  over 75 tokens" in lines[0]
    assert f"x{rows[1]['perplexity'] / rows[0]['perplexity']:.3f}" in lines[1]


def test_eval_of_several_texts_has_a_row_for_each(
    command: Command, sliced: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    output, _ = sliced("--width", 24)
    other = tiny.random_ids(1, 100, seed=8)[0].tolist()
    (tmp_path / "other.txt").write_text(words.text(other))
    arguments = ["eval", model, output, "--data", text, "--data", tmp_path / "other.txt", "--seqlen", 50]
    rows = command(*arguments, "--samples", 2, "--json").json
    assert [(row["model"], row["data"]["data"]) for row in rows] == [
        (str(folder), name) for folder in (model, output) for name in ("text.txt", "other.txt")
    ]
    first = tiny.random_ids(1, 400)[0].tolist()
    for row, (folder, ids) in zip(rows, ((f, i) for f in (model, output) for i in (first, other)), strict=True):
        assert row["perplexity"] == pytest.approx(perplexity_of(folder, [ids[:50], ids[50:100]])[0], rel=1e-4)
    lines = command(*arguments, "--samples", 2).out.splitlines()
    ratios = [rows[2]["perplexity"] / rows[0]["perplexity"], rows[3]["perplexity"] / rows[1]["perplexity"]]
    assert [f"x{ratio:.3f}" in line for ratio, line in zip(ratios, lines[2:], strict=True)] == [True, True]


def test_eval_leaves_padding_out(command: Command, model: Path, tmp_path: Path) -> None:
    """A padded sequence counts as it would alone."""
    ids, mask = tiny.random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    save_file({"calibration": ids, "attention_mask": mask}, tmp_path / "ids.safetensors")
    (row,) = command("eval", model, "--data", tmp_path / "ids.safetensors", "--json").json
    perplexity, count = perplexity_of(model, [ids[0].tolist(), ids[1, 5:].tolist()])
    assert row["tokens"] == count == 11 + 6
    assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("arguments", [["--help"], ["slice", "--help"], ["inspect", "--help"], ["eval", "--help"]])
def test_help_is_given(arguments: list[str], command: Command) -> None:
    outcome = command(*arguments)
    assert outcome.code == 0
    assert "Usage:" in outcome.out
    assert outcome.err == ""


def test_without_arguments_the_verbs_are_listed(command: Command) -> None:
    outcome = command()
    assert all(verb in outcome.out + outcome.err for verb in ("slice", "inspect", "eval"))


def test_version(command: Command) -> None:
    outcome = command("--version")
    assert (outcome.code, outcome.out.strip()) == (0, eigenslice.__version__)


def test_sample_writes_text_to_calibrate_on(command: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sampled.json"
    outcome = command("sample", model, "-o", file, "--samples", 30, "--seqlen", 30, "--json", "-q")
    texts = json.loads(file.read_text())
    assert outcome.json == {"output": str(file), "texts": 30, "characters": sum(map(len, texts))}
    out = tmp_path / "out"
    outcome = command(
        "slice", model, "-o", out, "--width", 24, "--calibration", file, "--samples", 20, "--seqlen", 20, "-q"
    )
    assert outcome.code == 0, outcome
    assert json.loads((out / "eigenslice.json").read_text())["calibration"]["data"] == file.name
