"""The model card in each result's folder."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from eigenslice.cli import main
from eigenslice.errors import EigensliceWarning
from eigenslice.finetune import FinetuneOptions, finetune
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.report.card import CARD, write_card
from eigenslice.report.manifest import read_manifest
from eigenslice.report.story import base_model, custom_note, is_hub_id, slice_command
from tests.checkpoint.files import copy_of
from tests.conftest import Folders, Slicer
from tests.results import stored_tensors

LICENCE = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: someone/else\ntags:\n- theirs\n---\n\n# Theirs\n"


def test_slicing_writes_a_card(dense_folder: Folders, run_slice: Slicer, tmp_path: Path) -> None:
    source = copy_of(dense_folder("llama"), tmp_path / "source")
    (source / "README.md").write_text(LICENCE)
    result = run_slice("llama", model=str(source), width=24)
    card = ModelCard.load(result.output / "README.md")
    metadata = card.data.to_dict()
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["eigenslice", "slicegpt", "pruned"],
    }
    sizes = result.manifest["parameters"]
    stored = sum(a * b for a, b in (s if len(s) == 2 else (*s, 1) for s in stored_tensors(result.output).values()))
    assert sizes["stored"] == stored
    assert f"| parameters | {sizes['dense']:,} | {stored:,} |" in card.text
    assert "| hidden width | 32 | 24 |" in card.text
    loss = result.manifest["loss"]
    assert f"| {loss['dense_perplexity']:.4g} | {loss['sliced_perplexity']:.4g} (x" in card.text
    assert f"KL {loss['kl']:.3f} nats per token" in card.text
    assert f'from_pretrained("{result.output.name}")' in card.text


def test_a_large_loss_is_said_in_the_card_until_the_result_is_trained(run_slice: Slicer) -> None:
    result = run_slice("llama", width=24)
    loss = {"kl": 2.3, "perplexity_ratio": 8.5, "dense_perplexity": 2.0, "sliced_perplexity": 17.0, "tokens": 99}
    write_card(result.output, result.manifest | {"loss": loss}, "bad")
    assert "**Large loss.** This result is much worse than the dense model" in ModelCard.load(result.output / CARD).text
    write_card(result.output, result.manifest | {"loss": {"not_measured": "too few"}}, "unknown")
    card = ModelCard.load(result.output / CARD).text
    assert "| loss on held-out text | | not measured: too few |" in card
    assert "Large loss" not in card


def test_custom_results_say_how_they_load(run_slice: Slicer) -> None:
    card = ModelCard.load(run_slice("opt", width=24).output / "README.md")
    assert "custom_code" in card.data.to_dict()["tags"]
    assert "trust_remote_code=True" in card.text


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"basis": "per-block"}, "the shortcut matrices of a per-block basis"),
    ({"form": "custom"}, "as --form custom asked for"),
    ({"model": "opt"}, "no config of transformers holds a opt model"),
]


@pytest.mark.parametrize(("options", "reason"), REASONS, ids=lambda value: str(value)[:20])
def test_custom_results_say_why_they_are_custom(options: dict[str, Any], reason: str, run_slice: Slicer) -> None:
    chosen = dict(options)
    manifest = run_slice(chosen.pop("model", "llama"), width=24, **chosen).manifest
    assert reason in custom_note(manifest)


def test_a_number_of_neurons_for_each_block_is_a_reason(run_slice: Slicer) -> None:
    manifest = run_slice("llama", width=24, form="custom").manifest
    manifest["options"]["form"] = "auto"
    manifest["plan"]["neurons"] = [40, 48, 56]
    assert "one number of MLP neurons for all blocks" in custom_note(manifest)


ODD = "a|b`c <script>x</script> [l](u) *s* \u202egpj\n# heading\n---\n```"


def test_names_can_not_break_the_card(run_slice: Slicer, tmp_path: Path) -> None:
    """Tables keep their cells, the page its headings and code blocks, whatever things are called."""
    manifest = run_slice("opt", width=24).manifest
    write_card(tmp_path, manifest, "plain")
    plain = (tmp_path / "README.md").read_text(encoding="utf-8")
    manifest["source"] |= {"name": ODD, "model_type": ODD}
    manifest["options"] |= {"model": ODD, "output": ODD}
    manifest["calibration"]["data"] = [{"data": ODD, "sequences": 3}]
    manifest["finetune"] = {
        "trained": ODD,
        "steps": 2,
        "teacher": ODD,
        "data": {"data": ODD, "sequences": 3, "tokens": 12},
        "perplexity": {"before": 9.0, "after": 8.0, "tokens": 5},
        "options": {"model": ODD, "output": ODD, "data": {"data": [ODD], "field": ["a|b"]}},
    }
    write_card(tmp_path, manifest, ODD, {"license": "mit"})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()["license"] == "mit"
    text = card.split("\n---\n", 1)[1]
    assert "<script>" not in re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Use",
        "## Recovery fine-tuning",
        "## How it was made",
    ]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert set(cells) == {4}
    assert text.count("\n```") == plain.count("\n```")


def test_a_hub_id_is_the_base_model(run_slice: Slicer, tmp_path: Path) -> None:
    manifest = run_slice("llama", width=24).manifest
    manifest["source"]["name"] = "Qwen/Qwen3-0.6B"
    write_card(tmp_path, manifest, "small")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()["base_model"] == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("./a/b", False),
        ("../b", False),
        ("models/a.gguf", False),
        ("owner/name@v1.0", True),
        ("a b/c", False),
        ("a/b\nc", False),
        ("a/" + "b" * 5000, False),
        ("a/b\x00", False),
        ("a", False),
        ("/a", False),
    ],
)
def test_hub_ids(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected
    assert base_model(name) == (name.partition("@")[0] if expected else None)


def test_a_broken_card_of_the_source_is_left_out(dense_folder: Folders, run_slice: Slicer, tmp_path: Path) -> None:
    source = copy_of(dense_folder("llama"), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.warns(EigensliceWarning, match="has license of another kind"):
        result = run_slice("llama", model=str(source), width=24)
    assert "license" not in ModelCard.load(result.output / "README.md").data.to_dict()


def test_the_command_makes_the_same_result(run_slice: Slicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_slice("opt", width=24, basis="per-block", untie=True, shard_gib=1e-5)
    command = slice_command(result.manifest)
    expected = result.output.rename(tmp_path / "expected")
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "-q"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert "--untie" in command
    assert {f.name: f.read_bytes() for f in expected.iterdir()} == {
        f.name: f.read_bytes() for f in result.output.iterdir()
    }


def test_fine_tuning_is_told(run_slice: Slicer, calibration: Path, tmp_path: Path) -> None:
    sliced = run_slice("llama", width=24).output
    data = CalibrationOptions(data=str(calibration))
    options = FinetuneOptions(
        model=str(sliced), output=tmp_path / "tuned", data=data, held_out=2, full=True, device="cpu", learning_rate=1e-2
    )
    result = finetune(options)
    card = ModelCard.load(result.output / "README.md")
    assert "## Recovery fine-tuning" in card.text
    assert f"{result.before.perplexity:.2f} → {result.after.perplexity:.2f}" in card.text
    assert f"eigenslice finetune {sliced} -o {tmp_path / 'tuned'} --full --learning-rate 0.01 --held-out 2" in card.text
    manifest = read_manifest(result.output)
    assert manifest is not None
    assert manifest["finetune"]["base"]["sha256"].keys() >= {"model.safetensors"}
