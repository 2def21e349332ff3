"""Everything that the user can get wrong ends in one message and exit code 2, and leaves nothing behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.checkpoint.weights import SINGLE
from eigenslice.stream.walk import Stream
from tests import tiny, words
from tests.checkpoint.files import Tensors, copy_of, edit_json, rewrite
from tests.cli.conftest import Command, Failure


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where results go: neither the folder nor its parent is there yet."""
    return tmp_path / "results" / "out"


@pytest.fixture
def slice_fails(fails: Failure, output: Path, calibration: Path) -> Failure:
    """Slices, to width 24 and with token ids if nothing else is said, into nothing."""

    def run(model: object, *arguments: object) -> str:
        given = {str(argument) for argument in arguments}
        size = [] if given & {"--keep", "--slicing", "--width", "--recipe", "nothing"} else ["--width", 24]
        data = [] if "--calibration" in given else ["--calibration", calibration]
        rest = [argument for argument in arguments if argument != "nothing"]
        message = fails("slice", model, "-o", output, *size, *data, *rest)
        assert not output.parent.exists(), "something is left behind"
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--slicing", 1], "--slicing 1.0"),
        (["--slicing", -0.1], "--slicing -0.1"),
        (["--slicing", "nan"], "--slicing nan"),
        (["--slicing", 0.99], "--slicing 0.99 leaves width 0; the model's hidden width is 32"),
        (["--keep", 0], "--keep 0.0"),
        (["--keep", 1.01], "--keep 1.01"),
        (["--keep", "nan"], "--keep nan"),
        (["--keep", 0.001], "--keep 0.001 is 31 parameters; the narrowest model tried stores"),
        (["--width", 0], "--width 0; the model's hidden width is 32"),
        (["--width", -8], "--width -8"),
        (["--width", 33], "--width 33; the model's hidden width is 32"),
        (["--keep", 0.75, "--width", 24], "--keep and --width together"),
        (["--keep", 0.75, "--slicing", 0.2, "--width", 24], "--keep and --slicing and --width together"),
        (["nothing"], "no size was given"),
        (["--width", 24, "--recipe", "r.yaml"], "--width and --recipe together"),
        (["--width", 24, "--neurons", 0], "--neurons 0; the model has 56 MLP neurons in each block"),
        (["--width", 24, "--neurons", 57], "--neurons 57; the model has 56 MLP neurons in each block"),
        (["--keep", 0.75, "--neurons", 40], "--neurons 40 with --keep"),
        (["--width", 24, "--neurons", 40, "--no-mlp"], "--neurons 40 with --keep, --recipe or --no-mlp"),
        (["--width", 24, "--neurons", 40, "--basis", "per-block"], "--neurons 40 with --basis per-block"),
        (["--width", 24, "--neurons", 40, "--width", 33], "--width 33; the model's hidden width is 32"),
        (["--width", 24, "--basis", "per-block", "--refit"], "--refit with --basis per-block"),
        (["--recipe", "/no/such/recipe.yaml"], "--recipe /no/such/recipe.yaml can't be read"),
        (["--width", 24, "--samples", 0], "--samples 0"),
        (["--width", 24, "--seqlen", 1], "--seqlen 1"),
        (["--width", 24, "--field", "a", "--field", "b"], "2 times --field for 1 texts"),
        (["--width", 24, "--calibration", "mixed", "--samples", 4], "--samples 4 for 5 texts"),
        (["--width", 24, "--shard-size", 0], "--shard-size 0.0"),
        (["--width", 24, "--shard-size", "nan"], "--shard-size nan"),
        (["--width", 24, "--shard-size", "inf"], "--shard-size inf"),
        (["--width", 24, "--device", "abacus"], "abacus"),
        (["--width", 24, "--basis", "per-block", "--form", "stock"], "no stock config can hold width 24"),
    ],
    ids=lambda value: "-".join(str(v).strip("-") for v in value) if isinstance(value, list) else "",
)
def test_options_that_can_not_be_met(arguments: list[object], found: str, slice_fails: Failure, model: Path) -> None:
    assert found in slice_fails(model, *arguments)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "can't be read"),
        ("width: [", "can't be read"),
        ("neurons: 40", "has a wrong width (missing)"),
        ("width: 24\ndepth: 3", "has a wrong depth"),
        ("24: 3", "has a wrong 24"),
        ("width: 24\nneurons: [40, 40]", "has a wrong neurons (the result has 3 blocks)"),
        ("width: 24\nneurons: [40, 57, 40]", "the recipe keeps 57 neurons; the model has 56 MLP neurons"),
        ("width: 33", "the recipe's width is 33; the model's hidden width is 32"),
        ("width: 24\nbasis: per-block", "has a wrong basis per-block (the run has --basis global)"),
    ],
    ids=repr,
)
def test_recipes_that_are_wrong(text: str, found: str, slice_fails: Failure, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert found in slice_fails(model, "--recipe", tmp_path / "recipe.yaml")


def test_a_stock_result_with_a_number_of_neurons_for_each_block(
    slice_fails: Failure, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("width: 24\nneurons: [40, 40, 48]")
    message = slice_fails(model, "--recipe", tmp_path / "recipe.yaml", "--form", "stock")
    assert "stock configs have one number of MLP neurons for all blocks" in message


@pytest.mark.parametrize("size", [["--keep", 0.7], ["--width", 32, "--neurons", 40]], ids=["keep", "neurons"])
def test_nan_in_a_block_of_a_model_of_which_neurons_are_cut(
    size: list[object], slice_fails: Failure, model: Path
) -> None:
    rewrite(model, break_block)
    assert BROKEN in slice_fails(model, *size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(slice_fails: Failure, model: Path) -> None:
    assert "cuda" in slice_fails(model, "--device", "cuda")


def test_layer_norm_models_keep_at_least_two(slice_fails: Failure, dense_folder: Callable[[str], Path]) -> None:
    assert "--width 1;" in slice_fails(dense_folder("phi"), "--width", 1)


def test_a_stock_result_of_an_architecture_that_has_none(
    slice_fails: Failure, dense_folder: Callable[[str], Path]
) -> None:
    message = slice_fails(dense_folder("opt"), "--form", "stock")
    assert "no stock config can hold width 24: opt: the type can't hold this width" in message


def test_an_output_that_exists(fails: Failure, model: Path, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("content")
    before = sorted(tmp_path.rglob("*"))
    message = fails("slice", model, "-o", tmp_path / "old", "--width", 24, "--calibration", calibration)
    assert f"{tmp_path / 'old'} exists already" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_an_existing_parent_as_it_was(
    fails: Failure, model: Path, calibration: Path, tmp_path: Path
) -> None:
    rewrite(model, break_block)
    before = sorted(tmp_path.rglob("*"))
    fails("slice", model, "-o", tmp_path / "out", "--width", 24, "--calibration", calibration)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_does_not_exist(slice_fails: Failure) -> None:
    assert "/no/such/model doesn't exist" in slice_fails("/no/such/model")
    assert "nobody/nothing doesn't exist here" in slice_fails("nobody/nothing")


def test_an_unsupported_architecture(slice_fails: Failure, model: Path) -> None:
    edit_json(model / "config.json", model_type="t5")
    assert "model_type 't5' is an encoder-decoder" in slice_fails(model)


def test_an_unsupported_variant(slice_fails: Failure, dense_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(dense_folder("opt"), tmp_path / "opt")
    edit_json(folder / "config.json", do_layer_norm_before=False)
    assert "do_layer_norm_before=false" in slice_fails(folder)


def test_a_quantized_model(slice_fails: Failure, model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "awq"})
    assert "quantized by 'awq'" in slice_fails(model)


def test_an_already_sliced_model(
    command: Command, slice_fails: Failure, model: Path, calibration: Path, tmp_path: Path
) -> None:
    sliced = tmp_path / "sliced"
    options = ["--basis", "per-block", "--width", 24, "--calibration", calibration]
    assert command("slice", model, "-o", sliced, *options).code == 0
    assert "is a sliced model already" in slice_fails(sliced)


BROKEN = "model.layers.1.mlp.down_proj.weight holds NaN or infinite numbers, the first one at [3, 4]"


def break_block(tensors: Tensors) -> None:
    """Put a NaN into the middle block."""
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan


@pytest.mark.parametrize("basis", ["global", "per-block"])
def test_nan_in_a_block(basis: str, slice_fails: Failure, model: Path) -> None:
    rewrite(model, break_block)
    assert BROKEN in slice_fails(model, "--basis", basis)


def test_nan_in_the_embeddings(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t["model.embed_tokens.weight"].fill_(torch.nan))
    assert "model.embed_tokens.weight holds NaN or infinite numbers, the first one at [0, 0]" in slice_fails(model)


def test_nan_in_a_row_of_the_embedding_that_no_text_uses(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t["model.embed_tokens.weight"][1, 5].fill_(torch.nan))
    assert "model.embed_tokens.weight holds NaN or infinite numbers, the first one at [1, 5]" in slice_fails(model)


def test_nan_in_the_head_which_calibration_never_runs(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t["lm_head.weight"][3].fill_(torch.inf))
    assert "lm_head.weight holds NaN or infinite numbers, the first one at [3, 0]" in slice_fails(model)


def test_weights_that_overflow_in_the_stored_dtype_cost_the_last_pass_only(
    fails: Failure, command: Command, model: Path, calibration: Path, tmp_path: Path
) -> None:
    rewrite(model, lambda t: t["lm_head.weight"].mul_(1e6))
    run = ["slice", model, "--width", 24, "--neurons", 40, "--calibration", calibration, "-q", "-o"]
    message = fails(*run, tmp_path / "out", "--dtype", "float16")
    assert "lm_head.weight doesn't fit into float16" in message
    measured = tmp_path / "out.partial" / "state" / "measuring.safetensors"
    before = measured.stat().st_mtime_ns
    assert "was begun with something else" in fails(*run, tmp_path / "out", "--resume", "--seed", 1)
    assert measured.stat().st_mtime_ns == before
    assert command(*run, tmp_path / "out", "--resume", "--dtype", "bfloat16").code == 0
    assert command(*run, tmp_path / "whole", "--dtype", "bfloat16").code == 0
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "whole" / SINGLE).read_bytes()


def test_weights_that_overflow_in_the_compute_dtype(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(1e6))
    message = slice_fails(model, "--compute-dtype", "float16")
    assert "model.layers.1.mlp.down_proj.weight holds numbers up to" in message


def test_activations_that_overflow_in_the_compute_dtype(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(1e5))
    assert "block 1 (of 0 to 2) gives NaN or infinite activations in float16" in slice_fails(
        model, "--compute-dtype", "float16"
    )


@pytest.mark.parametrize("keep", [0, 100, -1], ids=["empty", "in-header", "in-data"])
def test_truncated_weights(keep: int, slice_fails: Failure, model: Path) -> None:
    content = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(content[:keep])
    assert f"{model / SINGLE} is not a readable safetensors file" in slice_fails(model)


def test_weights_that_are_missing(slice_fails: Failure, model: Path) -> None:
    rewrite(model, lambda t: t.pop("model.norm.weight"))
    assert "lacks 1 tensors (model.norm.weight)" in slice_fails(model)


def test_no_tokenizer_for_a_text(slice_fails: Failure, dense_folder: Callable[[str], Path], text: Path) -> None:
    message = slice_fails(dense_folder("llama"), "--calibration", text)
    assert "has no tokenizer that transformers can load" in message


def test_a_broken_tokenizer_beside_token_ids(slice_fails: Failure, model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in slice_fails(model)


def test_a_tokenizer_of_another_model(slice_fails: Failure, model: Path, tmp_path: Path) -> None:
    words.tokenizer(vocabulary=200).save_pretrained(model)
    (tmp_path / "text.txt").write_text(words.text(list(range(50, 200))))
    assert "199" in slice_fails(model, "--calibration", tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("empty.txt", "", "holds no text"),
        ("empty.json", "[]", "holds no text"),
        ("word.txt", "w7", "holds 1 tokens"),
        ("broken.json", "[", "can't be read"),
        ("object.json", "{}", "holds a dict"),
        ("records.jsonl", '{"body": "w7"}', "it has ['body']"),
        ("garbage.safetensors", "garbage", "is not a readable safetensors file"),
    ],
)
def test_calibration_files_without_use(
    name: str, content: str, found: str, slice_fails: Failure, model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    message = slice_fails(model, "--calibration", tmp_path / name)
    assert name in message
    assert found in message


def test_calibration_data_that_do_not_exist(slice_fails: Failure, model: Path) -> None:
    message = slice_fails(model, "--calibration", "/no/such/file.txt")
    assert "/no/such/file.txt" in message


def test_token_ids_of_another_model(slice_fails: Failure, model: Path, tmp_path: Path) -> None:
    save_file({"calibration": torch.full((2, 9), 1000)}, tmp_path / "ids.safetensors")
    message = slice_fails(model, "--calibration", tmp_path / "ids.safetensors")
    assert "has ids from 1000 to 1000" in message


def test_an_interruption_leaves_nothing_behind(
    command: Command, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "walk", interrupt)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["-o", tmp_path / "new" / "out", "--width", 24, "--calibration", calibration]
    outcome = command("slice", model, *arguments)
    assert sorted(tmp_path.rglob("*")) == before
    assert outcome.code == 130
    assert "interrupted; nothing was written" in outcome.err


def test_inspect_explains_as_well(fails: Failure, model: Path, tmp_path: Path) -> None:
    assert "has no config.json" in fails("inspect", tmp_path)
    edit_json(model / "config.json", model_type="t5")
    assert "'t5'" in fails("inspect", model, "--json")


def test_eval_without_a_model(fails: Failure, calibration: Path, tmp_path: Path) -> None:
    assert "has no config.json" in fails("eval", tmp_path, "--data", calibration)
    assert "doesn't exist" in fails("eval", "/no/such/model", "--data", calibration)


def test_eval_on_a_device_that_is_none(fails: Failure, model: Path, calibration: Path) -> None:
    assert "abacus" in fails("eval", model, "--data", calibration, "--device", "abacus")


def test_eval_of_pickles(fails: Failure, model: Path, calibration: Path) -> None:
    (model / SINGLE).unlink()
    torch.save(tiny.CASES["llama"].build().state_dict(), model / "pytorch_model.bin")
    assert "only pytorch_model.bin, and pickles can run code" in fails("eval", model, "--data", calibration)


def test_eval_of_a_checkpoint_that_lacks_weights(fails: Failure, model: Path, calibration: Path) -> None:
    """transformers would fill them with random numbers."""
    rewrite(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in fails("eval", model, "--data", calibration)


def test_eval_of_nan(fails: Failure, model: Path, calibration: Path) -> None:
    rewrite(model, break_block)
    assert "the loss is nan" in fails("eval", model, "--data", calibration)


def test_eval_of_a_loss_beyond_every_perplexity(fails: Failure, model: Path, calibration: Path) -> None:
    """exp(loss) is no float from a loss of 710 on."""
    rewrite(model, lambda t: t["lm_head.weight"].mul_(1e4))
    assert "the loss is" in fails("eval", model, "--data", calibration)


def test_eval_of_ids_of_which_none_can_be_predicted(fails: Failure, model: Path, tmp_path: Path) -> None:
    """A mask with one token in each sequence."""
    mask = torch.eye(4, dtype=torch.int64)
    save_file({"calibration": tiny.random_ids(4, 4), "attention_mask": mask}, tmp_path / "ids.safetensors")
    fails("eval", model, "--data", tmp_path / "ids.safetensors")


def test_eval_without_tokenizer(fails: Failure, dense_folder: Callable[[str], Path], text: Path) -> None:
    message = fails("eval", dense_folder("llama"), "--data", text, "--seqlen", 8)
    assert "no tokenizer that transformers can load" in message


@pytest.mark.parametrize("option", [["--samples", 0], ["--seqlen", 1]], ids=["no-samples", "no-predictions"])
def test_eval_of_nothing(option: list[object], fails: Failure, model: Path, calibration: Path) -> None:
    assert " ".join(map(str, option)) in fails("eval", model, "--data", calibration, *option)


@pytest.mark.parametrize(
    "arguments",
    [
        ["slice", "model"],
        ["slice", "model", "-o", "out", "--width", "wide"],
        ["slice", "model", "-o", "out", "--width", "8", "--basis", "local"],
        ["eval"],
        ["melt", "model"],
        ["inspect", "model", "--loudly"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_none_shows_its_usage(
    arguments: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "Usage:" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_fails_the_same_way(model: Path, tmp_path: Path, calibration: Path) -> None:
    rewrite(model, break_block)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["slice", model, "-o", tmp_path / "new" / "out", "--width", 24, "--calibration", calibration]
    done = subprocess.run(
        [sys.executable, "-m", "eigenslice", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert BROKEN in message[0]
    assert [line.split(":")[0].strip() for line in message] == ["error", "allowed", "next"]
    assert sorted(tmp_path.rglob("*")) == before
