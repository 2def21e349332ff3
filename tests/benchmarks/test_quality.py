"""The quality benchmark on a tiny Llama: its numbers against short formulas in float64, its baselines by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import baselines
import quality
from candidates import plan_text
from eigenslice import slice_model
from eigenslice.data.batches import Batch
from eigenslice.errors import EigensliceError, OptionsError
from eigenslice.evaluation.perplexity import perplexity
from rivals import parts
from scores import Score, compare
from tests import tiny, words
from tests.checkpoint.files import copy_of
from tests.results import load

METHODS = ["ours", "ours-custom", "paper-per-block", "drop-blocks", "width-pruning"]


def model_of(case: str) -> Any:
    return tiny.CASES[case].build()


def batches_of(*shapes: tuple[int, int]) -> list[Batch]:
    return [Batch(tiny.random_ids(*shape, seed=number)) for number, shape in enumerate(shapes)]


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """log p (T-1, V) of one sequence in float64."""
    with torch.no_grad():
        return model(ids[None]).logits[0, :-1].double().log_softmax(-1)


def test_scores_are_those_of_the_formulas() -> None:
    """One token after the other, with windows of two lengths and more positions than are compared at once."""
    model, other = model_of("llama"), model_of("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    batches = batches_of((2, 60), (1, 7), (3, 2))
    losses, divergences, agreements = [], [], []
    for ids in (row for batch in batches for row in batch.input_ids):
        for p, q, target in zip(*(log_probabilities(m, ids) for m in (model, other)), ids[1:], strict=True):
            losses.append(-float(q[target]))
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            agreements.append(int(p.argmax()) == int(q.argmax()))
    dense, score = compare(model, [other], batches)
    assert score.tokens == dense.tokens == len(losses) == 2 * 59 + 6 + 3
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert score.kl == pytest.approx(sum(divergences) / len(losses), rel=1e-4)
    assert score.kl > 0.01
    assert score.top1 == sum(agreements) / len(losses)
    assert 0 < score.top1 < 1


def test_the_dense_model_is_like_itself_and_as_eval_measures_it() -> None:
    model, batches = model_of("llama"), batches_of((2, 20), (1, 60))
    (dense,) = compare(model, [], batches)
    assert (dense.kl, dense.top1) == (0, 1)
    assert dense.perplexity == pytest.approx(perplexity(model, batches).perplexity, rel=1e-6)


def test_padding_does_not_count() -> None:
    model, other, ids = model_of("llama"), model_of("llama-tied"), tiny.random_ids(1, 12)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    (_, alone), (_, beside) = compare(model, [other], [Batch(ids)]), compare(model, [other], [Batch(padded, mask)])
    assert beside.tokens == alone.tokens == 11
    assert beside.loss == pytest.approx(alone.loss, rel=1e-4)
    assert beside.kl == pytest.approx(alone.kl, rel=1e-3)


def test_a_broken_model_has_no_perplexity() -> None:
    row = quality.scores_row(Score(1000.0, 3.0, 0.5, 10), Score(2.0, 0.0, 1.0, 10))
    assert set(row.values()) == {None}


def silence(model: Any, block: int) -> Any:
    """Make a block add nothing to the stream."""
    with torch.no_grad():
        model.model.layers[block].self_attn.o_proj.weight.zero_()
        model.model.layers[block].mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("case", ["llama", "llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_a_block_that_does_nothing_is_dropped_first(case: str, block: int) -> None:
    model = silence(model_of(case), block)
    importance = baselines.measure(model, batches_of((2, 16)))
    assert importance.blocks[block] == pytest.approx(0, abs=1e-6)
    assert sorted(importance.blocks)[1] > 1e-3
    smaller, plan = baselines.drop_blocks(model, importance, baselines.stored(model) - 1)
    assert plan == f"without blocks {block}"
    size = sum(p.numel() for p in model.model.layers[block].parameters())
    assert baselines.stored(smaller) == baselines.stored(model) - size
    ids = tiny.random_ids(2, 20)
    with torch.no_grad():
        assert torch.allclose(smaller(ids).logits, model(ids).logits, atol=1e-5)
    assert len(model.model.layers) == 3, "the dense model is as it was"


def test_influence_is_one_minus_the_cosine() -> None:
    model, (batch,) = model_of("llama"), batches_of((2, 16))
    with torch.no_grad():
        states = model(batch.input_ids, output_hidden_states=True).hidden_states
    cosines = torch.nn.functional.cosine_similarity(states[0].double(), states[1].double(), dim=-1)
    assert baselines.measure(model, [batch]).blocks[0] == pytest.approx(1 - float(cosines.mean()), rel=1e-6)


def test_importance_leaves_padding_out() -> None:
    model, ids = model_of("llama"), tiny.random_ids(1, 12)
    padded, mask = (torch.nn.functional.pad(x, (4, 0)) for x in (ids, torch.ones_like(ids)))
    alone, beside = (baselines.measure(model, [batch]) for batch in (Batch(ids), Batch(padded, mask)))
    assert beside.blocks == pytest.approx(alone.blocks, rel=1e-4)
    assert torch.allclose(beside.channels, alone.channels, rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(beside.neurons, alone.neurons, strict=True))


@pytest.mark.parametrize("case", ["llama", "llama-tied", "llama-biased", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("size", [0.9, 0.5])
def test_widths_are_pruned_to_the_size(case: str, size: float) -> None:
    model = model_of(case)
    importance, most = baselines.measure(model, batches_of((2, 16))), int(size * baselines.stored(model))
    smaller, plan = baselines.prune_width(model, importance, most)
    assert 0.85 * most < baselines.stored(smaller) <= most
    hidden, neurons = smaller.model.norm.weight.shape[0], smaller.model.layers[0].mlp.up_proj.weight.shape[0]
    assert plan == f"hidden {hidden}, MLP {neurons}"
    assert neurons / 56 == pytest.approx(hidden / 32, abs=0.02)
    with torch.no_grad():
        assert smaller(tiny.random_ids(2, 20)).logits.isfinite().all()
    assert model.model.norm.weight.shape == (32,), "the dense model is as it was"


def test_channels_and_neurons_that_are_never_used_go_first() -> None:
    """A model whose last channels and some neurons are zero: pruned, it predicts what a rescaled norm makes of it."""
    model, dead = model_of("llama"), [3, 10, 20, 41]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for axis, kind in enumerate(baselines.AXES[".".join(name.split(".")[-2:])]):
                if kind == "hidden" and not name.endswith("norm.weight"):
                    parameter.index_fill_(axis, torch.arange(24, 32), 0)
                if kind == "mlp":
                    parameter.index_fill_(axis, torch.tensor(dead), 0)
    importance = baselines.measure(model, batches_of((2, 16)))
    assert (importance.channels[24:] == 0).all()
    assert (importance.channels[:24] > 0).all()
    for neurons in importance.neurons:
        assert (neurons == 0).nonzero()[:, 0].tolist() == dead
    block = 24 * (32 + 16 + 16 + 32) + 3 * 24 * 42 + 2 * 24  # 42 is 24/32 of 56
    most = 3 * block + 2 * 96 * 24 + 24
    smaller, _ = baselines.prune_width(model, importance, most)
    assert baselines.stored(smaller) == most
    assert torch.equal(smaller.model.embed_tokens.weight, model.model.embed_tokens.weight[:, :24])
    kept = [i for i in range(56) if i not in dead]
    up = model.model.layers[1].mlp.up_proj.weight[kept, :24]
    assert {tuple(row.tolist()) for row in smaller.model.layers[1].mlp.up_proj.weight} <= {
        tuple(r.tolist()) for r in up
    }


def test_baselines_say_what_they_can_not_do() -> None:
    with pytest.raises(EigensliceError, match="opt"):
        baselines.measure(model_of("opt"), batches_of((2, 16)))
    model = model_of("llama")
    importance = baselines.measure(model, batches_of((2, 16)))
    with pytest.raises(EigensliceError, match="one block is left"):
        baselines.drop_blocks(model, importance, 100)
    with pytest.raises(EigensliceError, match="one channel is left"):
        baselines.prune_width(model, importance, 100)


@pytest.fixture
def command(dense_folder: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """The benchmark's arguments for a tiny model with a tokenizer and three texts."""
    model = copy_of(dense_folder("llama-tied"), tmp_path / "model")
    words.tokenizer().save_pretrained(model)
    for number, name in enumerate(("a.txt", "b.txt", "test.txt")):
        (tmp_path / name).write_text(words.text(tiny.random_ids(1, 400, seed=number)[0].tolist()))
    goals = [words.text(tiny.random_ids(1, 9, seed=number)[0].tolist()) for number in range(20)]
    (tmp_path / "goals.jsonl").write_text("\n".join(json.dumps({"goal": goal, "sol1": "w5 w6"}) for goal in goals))
    calibration = [f"--calibration={tmp_path / name}" for name in ("a.txt", "b.txt")]
    tests = [f"--test=plain={tmp_path / 'test.txt'}", f"--test=piqa={tmp_path / 'goals.jsonl'}#goal,sol1"]
    sizes = ["--samples=12", "--seqlen=16", "--test-samples=3", "--sizes=0.9,0.01", "--together=3"]
    return [str(model), *calibration, *tests, *sizes, f"--work={tmp_path / 'work'}", "-o", str(tmp_path / "out" / "x")]


def test_the_whole_benchmark(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality.main(command)
    result = json.loads((tmp_path / "out" / "x.json").read_text())
    assert [(row["method"], row["size"]) for row in result["rows"]] == [(m, s) for m in METHODS for s in (0.9, 0.01)]
    good = [row for row in result["rows"] if "error" not in row]
    assert {row["method"] for row in good} >= {"ours", "drop-blocks", "width-pruning"}
    assert all(row["kept"] <= row["size"] == 0.9 for row in good)
    assert all(row["error"] for row in result["rows"] if row["size"] == 0.01)
    assert result["calibration"]["data"] == [{"data": f"{name}.txt", "sequences": 6} for name in "ab"]
    dense = load(tmp_path / "model")
    ids = tiny.random_ids(1, 400, seed=2)[0]
    batches = [Batch(ids[i : i + 16][None]) for i in range(0, 48, 16)]
    assert result["tests"]["plain"]["perplexity"] == pytest.approx(perplexity(dense, batches).perplexity, rel=1e-5)
    assert result["tests"]["piqa"]["predicted"] == 3 * 15
    assert not any(test["calibrated_on"] for test in result["tests"].values())
    ours = result["rows"][0]
    sliced = perplexity(load(tmp_path / "work" / "ours-0.9"), batches).perplexity
    assert ours["tests"]["plain"]["perplexity"] == pytest.approx(sliced, rel=1e-5)
    ratios = [test["ratio"] for test in ours["tests"].values()]
    assert ratios[0] == pytest.approx(sliced / result["tests"]["plain"]["perplexity"], rel=1e-5)
    assert ours["ratio"] == pytest.approx(math.prod(ratios) ** 0.5)
    assert (tmp_path / "out" / "x.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "x.md").read_text().splitlines()
    assert sum(line.startswith("| ours | ") for line in lines) == 2
    assert len({line.count(" | ") for line in lines if line.startswith("| ")}) == 1

    def never(*arguments: object) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(quality, "compare", never)
    monkeypatch.setattr("candidates.slice_model", never)
    quality.main([*command, "--sizes=0.9", "--methods=" + ",".join(dict.fromkeys(row["method"] for row in good))])
    assert json.loads((tmp_path / "out" / "x.json").read_text())["rows"] == good


def test_rivals_are_measured_and_stored(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["modegpt-mlp", "slimgpt", "flap-mlp"]
    command = [*command, f"--methods={','.join(names)}", "--sizes=0.85,0.01"]
    quality.main(command)
    rows = json.loads((tmp_path / "out" / "x.json").read_text())["rows"]
    assert [(row["method"], row["size"]) for row in rows] == [(name, size) for name in names for size in (0.85, 0.01)]
    assert all("keeps one" in row["error"] for row in rows if row["size"] == 0.01)
    good = [row for row in rows if row["size"] == 0.85]
    assert all(0.8 < row["kept"] <= 0.85 and row["plan"].startswith("MLP ") for row in good)
    dense = load(tmp_path / "model")
    ids = tiny.random_ids(1, 400, seed=2)[0]
    batches = [Batch(ids[i : i + 16][None]) for i in range(0, 48, 16)]
    stored = parts.load(dense, tmp_path / "work" / "slimgpt-0.85")
    assert baselines.stored(stored) == good[1]["parameters"]
    assert good[1]["tests"]["plain"]["perplexity"] == pytest.approx(perplexity(stored, batches).perplexity, rel=1e-5)

    def never(*arguments: object) -> None:
        pytest.fail("pruned again")

    monkeypatch.setattr("candidates.RIVALS", dict.fromkeys(names, never))
    (tmp_path / "work" / "dense" / "quality.json").unlink()
    for name in names:
        path = tmp_path / "work" / f"{name}-0.85" / "quality.json"
        path.write_text(json.dumps({"row": json.loads(path.read_text())["row"]}))
    quality.main([*command, "--sizes=0.85"])
    assert json.loads((tmp_path / "out" / "x.json").read_text())["rows"] == good


def test_an_interrupted_slicing_goes_on(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []

    def stop(stage: str, done: int, total: int, tokens: int = 0) -> None:
        stages.append(stage)
        if stage == "slicing":
            raise KeyboardInterrupt

    def watch(stage: str, done: int, total: int, tokens: int = 0) -> None:
        stages.append(stage)

    command = [*command, "--methods=ours", "--sizes=0.9"]
    monkeypatch.setattr("candidates.slice_model", lambda options: slice_model(options, stop))
    with pytest.raises(KeyboardInterrupt):
        quality.main(command)
    assert len(set(stages)) > 2
    stages.clear()
    monkeypatch.setattr("candidates.slice_model", lambda options: slice_model(options, watch))
    quality.main(command)
    assert set(stages) == {"slicing", "head", "predicting", "checking"}
    (row,) = json.loads((tmp_path / "out" / "x.json").read_text())["rows"]
    assert row["seconds"] is None, "the time of the first part isn't known"
    assert row["kept"] <= 0.9


def test_a_work_folder_of_other_settings_is_refused(command: list[str], tmp_path: Path) -> None:
    quality.main([*command, "--methods=drop-blocks", "--sizes=0.9"])
    with pytest.raises(OptionsError, match="another model or calibration"):
        quality.main([*command, "--methods=drop-blocks", "--sizes=0.9", "--seed=1"])


def test_a_test_on_the_calibration_text_is_marked(command: list[str], tmp_path: Path) -> None:
    quality.main([*command, f"--test=same={tmp_path / 'a.txt'}", "--methods=drop-blocks", "--sizes=0.9"])
    tests = json.loads((tmp_path / "out" / "x.json").read_text())["tests"]
    assert [name for name, test in tests.items() if test["calibrated_on"]] == ["same"]
    assert (tmp_path / "out" / "x.md").read_text().count("calibrated on this very text") == 1


def test_options_that_are_none(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main([*command, "--methods=magic"])
    assert (
        "no method magic; there are ours, ours-custom, ours-quarter, ours-custom-quarter, ours-given"
        in capsys.readouterr().err
    )
    with pytest.raises(OptionsError, match="NAME=SOURCE"):
        quality.main([*command, "--test=wikitext2"])


def test_plans_are_told_in_words() -> None:
    plan = {"basis": "global", "width": 24, "neurons": [8, 16], "tied": True, "dropped_blocks": [1, 2]}
    told = plan_text({"plan": plan, "site_widths": [24, 24, 24, 24, 24]})
    assert told == "basis global, width 24, neurons 8 to 16 (12), tied True, without blocks 1, 2"
