"""What lies beside the weights of a result: tokenizer, generation config, modelling file."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from eigenslice.checkpoint.companions import write_generation_config, write_modeling_file, write_tokenizer
from eigenslice.checkpoint.source import Source, open_source
from eigenslice.errors import CheckpointError
from eigenslice.modeling import modeling_eigenslice
from tests import tiny, words
from tests.checkpoint.files import copy_of, edit_json
from tests.checkpoint.gguf_file import write_gguf
from tests.messages import check_message


@pytest.fixture
def folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "model")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def gguf(tmp_path: Path) -> Source:
    return open_source(str(write_gguf(tiny.CASES["llama"].build(), tmp_path / "tiny.gguf")))


def test_the_tokenizer_works_from_the_result(folder: Path, output: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} w9")
    assert write_tokenizer(open_source(str(folder)), output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("w7 w95")["input_ids"] == [7, 95]
    assert tokenizer.eos_token == "</s>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w8"}], tokenize=False)
    assert chat == "w8 w9"


def test_tokenizer_files_are_copied_as_they_are_and_nothing_else_is(folder: Path, output: Path) -> None:
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json"):
        (folder / name).write_bytes(name.encode() + b"\r\n\xff")
    (folder / "README.md").write_text("not of the tokenizer")
    write_tokenizer(open_source(str(folder)), output)
    copied = {path.name for path in output.iterdir()}
    expected = {"tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer.json"}
    assert copied == expected | {"tokenizer_config.json"}
    for name in expected:
        assert (output / name).read_bytes() == (folder / name).read_bytes()


def test_the_tokenizers_class_is_one_that_older_versions_know(folder: Path, output: Path) -> None:
    before = json.loads((folder / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    write_tokenizer(open_source(str(folder)), output)
    after = json.loads((output / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "backend"} & set(after)
    assert after["eos_token"] == before["eos_token"]


def test_a_tokenizer_of_another_class_keeps_its_config(folder: Path, output: Path) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", is_local=True)
    write_tokenizer(open_source(str(folder)), output)
    name = "tokenizer_config.json"
    assert (output / name).read_bytes() == (folder / name).read_bytes()


def test_model_input_names_of_the_source_are_kept(folder: Path, output: Path) -> None:
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids"])
    write_tokenizer(open_source(str(folder)), output)
    assert json.loads((output / "tokenizer_config.json").read_text())["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize("content", ["{", "[]", "3"], ids=["no-json", "list", "number"])
def test_a_broken_tokenizer_config_is_a_checkpoint_error(content: str, folder: Path, output: Path) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(open_source(str(folder)), output)
    check_message(caught.value, "tokenizer_config.json")


def test_a_checkpoint_without_tokenizer_gives_none(dense_folder: Callable[[str], Path], output: Path) -> None:
    assert not write_tokenizer(open_source(str(dense_folder("llama"))), output)
    assert list(output.iterdir()) == []


def test_a_gguf_gives_the_tokenizer_that_transformers_reads_from_it(gguf: Source, output: Path) -> None:
    assert write_tokenizer(gguf, output)
    for text in ("abc!", "Zebra"):
        assert AutoTokenizer.from_pretrained(output)(text)["input_ids"] == gguf.tokenizer(text)["input_ids"]
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] != "TokenizersBackend"


def test_the_generation_config_is_copied_as_it_is(folder: Path, output: Path) -> None:
    content = b'{"temperature": 0.25, "do_sample":true,  "eos_token_id": [2, 7]}'
    (folder / "generation_config.json").write_bytes(content)
    write_generation_config(open_source(str(folder)), output)
    assert (output / "generation_config.json").read_bytes() == content


def test_a_checkpoint_without_generation_config_gives_none(folder: Path, output: Path) -> None:
    (folder / "generation_config.json").unlink()
    write_generation_config(open_source(str(folder)), output)
    assert list(output.iterdir()) == []


def test_a_gguf_gives_the_generation_config_that_transformers_makes_of_it(gguf: Source, output: Path) -> None:
    write_generation_config(gguf, output)
    generation = GenerationConfig.from_pretrained(output)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


def test_the_modelling_file_is_the_packages_and_needs_only_torch_and_transformers(output: Path) -> None:
    write_modeling_file(output)
    assert [path.name for path in output.iterdir()] == ["modeling_eigenslice.py"]
    content = (output / "modeling_eigenslice.py").read_bytes()
    assert content == Path(modeling_eigenslice.__file__).read_bytes()
    imported = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported == {"inspect", "typing", "torch", "transformers"}
