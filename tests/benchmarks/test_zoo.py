"""The zoo: its text, its batches, and a training of a few steps."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import naive
import zoo
from eigenslice.arch import TABLES
from eigenslice.errors import OptionsError
from tests import tiny, words
from tests.results import load

TINY = {
    "qwen3_moe": tiny.COMMON
    | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.1, "head_dim": 8},
    "gpt2": tiny.COMMON | {"model_type": "gpt2"},
}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's arguments for two tiny kinds and twenty stories in which tokens follow each other by a rule."""
    monkeypatch.setattr(zoo, "KINDS", TINY)
    monkeypatch.setattr(zoo, "LENGTH", 32)
    stories = [words.text(row.tolist()) for row in tiny.structured_ids(20, 70, seed=1) + 1]
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    words.tokenizer(100).save_pretrained(tmp_path / "tokenizer")
    paths = [f"--text={tmp_path / 'stories.json'}", f"--tokenizer={tmp_path / 'tokenizer'}"]
    return [*paths, f"--cache={tmp_path / 'zoo'}", "--tokens=12000"]


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_each_kind_has_a_table_and_a_million_parameters_in_its_blocks(kind: str) -> None:
    config = dict(zoo.KINDS[kind])
    assert kind in TABLES
    assert config["model_type"] == kind
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config, vocab_size=512)
        )
    assert 1e6 < naive.block_parameters(model) < 2e6
    assert naive.block_parameters(model) > 0.89 * naive.stored(model)
    assert bool(zoo.routers(model)) == ("experts" in " ".join(name for name, _ in model.named_parameters()))


def test_windows_and_batches() -> None:
    windows = zoo.cut_windows([[1, 5, 6], [1, 7], [1, 8, 9, 10]], 4)
    assert windows.tolist() == [[1, 5, 6, 1], [7, 1, 8, 9]]
    stream = torch.arange(100).view(25, 4)
    made = zoo.batches(stream, 3, seed=0)
    epochs = [[next(made) for _ in range(8)] for _ in range(3)]
    for epoch in epochs:
        assert all(batch.shape == (3, 4) for batch in epoch)
        rows = torch.cat(epoch)
        assert torch.equal(rows, rows[:, :1] + torch.arange(4))
        assert len(set(rows.flatten().tolist())) == 96, "no token comes twice"
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(next(zoo.batches(stream, 3, seed=0)), epochs[0][0])


def test_the_rate_rises_and_falls() -> None:
    rates = [zoo.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / zoo.WARMUP)
    assert max(rates) == rates[zoo.WARMUP - 1] > 0.99
    assert rates[zoo.WARMUP :] == sorted(rates[zoo.WARMUP :], reverse=True)
    assert rates[-1] == pytest.approx(zoo.LAST_RATE, abs=1e-4)


def test_loads_are_counted_and_balanced() -> None:
    model, ids = tiny.CASES["deepseek_v3"].build(), tiny.random_ids(2, 30)
    chosen: list[torch.Tensor] = []
    with ExitStack() as hooks:
        router = zoo.routers(model)[0]
        hooks.callback(router.register_forward_hook(lambda module, inputs, output: chosen.append(output[2])).remove)
        loads, bias = zoo.Loads(model, hooks), router.e_score_correction_bias.clone()
        with torch.no_grad():
            model(ids)
        expected = [float((chosen[0] == expert).sum()) / chosen[0].numel() for expert in range(4)]
        assert loads.shares[0] == pytest.approx(expected, abs=1e-4)
        loads.balance()
        change = router.e_score_correction_bias - bias
        assert change.sign().tolist() == [math.copysign(1, 0.25 - share) if share != 0.25 else 0 for share in expected]
        assert all(not count.any() for count in loads.counts)
    with torch.no_grad():
        model(ids)
    assert all(not count.any() for count in loads.counts), "no hook is left"


def test_models_are_trained_and_kept(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main(arguments)
    windows = zoo.text_windows(tmp_path / "stories.json", tmp_path / "tokenizer", tmp_path / "zoo")
    assert windows["train"].shape == (18 * 71 // 32, 32)
    assert windows["heldout"].shape == (2 * 71 // 32, 32)
    for kind, config in TINY.items():
        folder = tmp_path / "zoo" / kind
        record = json.loads((folder / zoo.RECORD).read_text())
        model = load(folder)
        assert model.config.model_type == config["model_type"]
        with torch.no_grad():
            loss = float(model(windows["heldout"], labels=windows["heldout"]).loss)
        assert record["held_out_loss"] == pytest.approx(loss, rel=1e-4)
        assert loss < 0.9 * math.log(93), "less than the entropy of the tokens that there are"
        assert record["parameters"] == naive.stored(model)
        assert AutoTokenizer.from_pretrained(folder)("w7 w9").input_ids == [7, 9]
    shares = json.loads((tmp_path / "zoo/qwen3_moe/zoo.json").read_text())["expert_shares"]
    assert [sum(layer) for layer in shares] == pytest.approx([1, 1, 1], abs=1e-3)
    capsys.readouterr()
    zoo.main(arguments)
    assert capsys.readouterr().out == "qwen3_moe: is there\ngpt2: is there\n"
    assert not list((tmp_path / "zoo").glob("*.partial"))


def test_a_cache_is_of_one_text(arguments: list[str], tmp_path: Path) -> None:
    text, tokenizer, cache = tmp_path / "stories.json", tmp_path / "tokenizer", tmp_path / "zoo"
    zoo.text_windows(text, tokenizer, cache)
    text.write_text(json.dumps(["w5 w6"] * 10))
    with pytest.raises(OptionsError, match="holds another text"):
        zoo.text_windows(text, tokenizer, cache)
    text.write_text(json.dumps({"text": "w5"}))
    with pytest.raises(OptionsError, match="no list of stories"):
        zoo.text_windows(text, tokenizer, tmp_path / "other")
