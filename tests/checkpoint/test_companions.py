"""What lies beside the weights of a result: tokenizer, generation config, modelling file."""

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer, GenerationConfig

from eigenslice.checkpoint.companions import copy_companions, stage_companions, write_modeling_file
from eigenslice.checkpoint.names import TOKENIZER_FILES, is_of_tokenizer
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
    stage_companions(open_source(str(folder)), output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("w7 w95")["input_ids"] == [7, 95]
    assert tokenizer.eos_token == "</s>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w8"}], tokenize=False)
    assert chat == "w8 w9"


def test_tokenizer_files_are_copied_as_they_are_and_nothing_else_is(folder: Path, output: Path) -> None:
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json"):
        (folder / name).write_bytes(name.encode() + b"\r\n\xff")
    (folder / "README.md").write_text("not of the tokenizer")
    stage_companions(open_source(str(folder)), output)
    copied = {path.name for path in output.iterdir()}
    expected = {"tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer.json"}
    assert copied == expected | {"tokenizer_config.json", "generation_config.json"}
    for name in expected:
        assert (output / name).read_bytes() == (folder / name).read_bytes()


def test_the_tokenizers_class_is_one_that_older_versions_know(folder: Path, output: Path) -> None:
    before = json.loads((folder / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    stage_companions(open_source(str(folder)), output)
    after = json.loads((output / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "backend"} & set(after)
    assert after["eos_token"] == before["eos_token"]


def test_a_tokenizer_of_another_class_keeps_its_config(folder: Path, output: Path) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", is_local=True)
    stage_companions(open_source(str(folder)), output)
    name = "tokenizer_config.json"
    assert (output / name).read_bytes() == (folder / name).read_bytes()


def test_model_input_names_of_the_source_are_kept(folder: Path, output: Path) -> None:
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids"])
    stage_companions(open_source(str(folder)), output)
    assert json.loads((output / "tokenizer_config.json").read_text())["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize("content", ["{", "[]", "3"], ids=["no-json", "list", "number"])
def test_a_broken_tokenizer_config_is_a_checkpoint_error(content: str, folder: Path, output: Path) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        stage_companions(open_source(str(folder)), output)
    check_message(caught.value, "tokenizer_config.json")


def test_a_checkpoint_without_tokenizer_gives_none(dense_folder: Callable[[str], Path], output: Path) -> None:
    stage_companions(open_source(str(dense_folder("llama"))), output)
    assert [path.name for path in output.iterdir()] == ["generation_config.json"]


def test_a_gguf_gives_the_tokenizer_that_transformers_reads_from_it(gguf: Source, output: Path) -> None:
    stage_companions(gguf, output)
    for text in ("abc!", "Zebra"):
        assert AutoTokenizer.from_pretrained(output)(text)["input_ids"] == gguf.tokenizer(text)["input_ids"]
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] != "TokenizersBackend"


def test_the_generation_config_is_copied_as_it_is(folder: Path, output: Path) -> None:
    content = b'{"temperature": 0.25, "do_sample":true,  "eos_token_id": [2, 7]}'
    (folder / "generation_config.json").write_bytes(content)
    stage_companions(open_source(str(folder)), output)
    assert (output / "generation_config.json").read_bytes() == content


def test_a_checkpoint_without_generation_config_gives_none(folder: Path, output: Path) -> None:
    (folder / "generation_config.json").unlink()
    stage_companions(open_source(str(folder)), output)
    assert not (output / "generation_config.json").exists()


def test_a_gguf_gives_the_generation_config_that_transformers_makes_of_it(gguf: Source, output: Path) -> None:
    stage_companions(gguf, output)
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
    assert imported == {"functools", "inspect", "typing", "torch", "transformers"}


KINDS = [
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
    "tiktoken.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenizer.4.0.0.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENCE.md",
    "NOTICE.txt",
    "LICENSE-MIT",
    "USE_POLICY.md",
]
OTHERS = ["license_plates.bin", "trainer_state.json", "README.md", "notes.txt", "code.py", "notice.py", "x/LICENSE"]


def write(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_that_a_tokenizer_or_processor_needs_and_licences_are_copied_and_nothing_else(
    folder: Path, output: Path
) -> None:
    for name in [*KINDS, *OTHERS]:
        write(folder, name, f'{{"of": "{name}"}}')
    stage_companions(open_source(str(folder)), output)
    own = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names_in(output) == {*KINDS, *own}
    for name in KINDS:
        assert (output / name).read_text() == f'{{"of": "{name}"}}'


def test_additional_chat_templates_are_templates_of_the_results_tokenizer(folder: Path, output: Path) -> None:
    (folder / "chat_template.jinja").write_text("plain")
    write(folder, "additional_chat_templates/tool_use.jinja", "with tools")
    stage_companions(open_source(str(folder)), output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w8"}], chat_template="tool_use", tokenize=False)
    assert chat == "with tools"


@pytest.mark.parametrize("link", ["legal/TERMS.txt", "TERMS", "./TERMS"])
def test_the_licence_that_the_card_links_to_is_copied(link: str, folder: Path, output: Path) -> None:
    write(folder, "README.md", f"---\nlicense: other\nlicense_link: {link}\n---\n")
    write(folder, link, "the terms")
    stage_companions(open_source(str(folder)), output)
    assert (output / link).read_text() == "the terms"


@pytest.mark.parametrize(
    "link",
    [
        "config.json",
        "README.md",
        "./README.md",
        "../secret.txt",
        "/etc/hostname",
        "https://example.org/x",
        "[1, 2]",
        "nothing",
        "",
        "model.safetensors",
    ],
)
def test_a_licence_link_that_leads_elsewhere_copies_nothing(link: str, folder: Path, output: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    write(folder, "README.md", f"---\nlicense_link: {link}\n---\n")
    stage_companions(open_source(str(folder)), output)
    assert names_in(output) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize("front", ["2024: release", "license_link: {self: 1", "x: " + "[" * 5000, "- a"])
def test_an_odd_card_is_no_reason_to_stop(front: str, folder: Path, output: Path) -> None:
    write(folder, "README.md", f"---\n{front}\n---\n")
    stage_companions(open_source(str(folder)), output)
    assert (output / "tokenizer.json").exists()


def test_every_vocabulary_of_transformers_tokenizers_is_known() -> None:
    """Asks the source text: importing all 100 modules takes half a minute."""
    known = {*TOKENIZER_FILES}
    for module in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", module.read_text(), flags=re.DOTALL):
            files = re.findall(r""":\s*"([^"]+)\"""", block)
            assert files or not block.strip(), module
            assert {file for file in files if not is_of_tokenizer(file)} == set(), module
    assert {"tokenizer.json", "chat_template.jinja"} <= known


class TestLinks:
    """Files that are no files of the folder."""

    @pytest.mark.parametrize("name", ["special_tokens_map.json", "LICENSE", "generation_config.json", "README.md"])
    def test_a_link_out_of_the_folder_is_refused(self, name: str, folder: Path, output: Path) -> None:
        secret = folder.parent / "secret.txt"
        secret.write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(CheckpointError) as caught:
            copy_companions("model", folder, output, trust_remote_code=False)
        check_message(caught.value, name, "secret.txt")
        assert not (output / name).exists()

    def test_a_linked_folder_of_templates_is_refused(self, folder: Path, output: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        write(folder.parent, "elsewhere/x.jinja", "secret")
        (folder / "additional_chat_templates").symlink_to(elsewhere)
        with pytest.raises(CheckpointError) as caught:
            copy_companions("model", folder, output, trust_remote_code=False)
        check_message(caught.value, "x.jinja")

    def test_a_pipe_is_refused(self, folder: Path, output: Path) -> None:
        os.mkfifo(folder / "LICENSE")
        with pytest.raises(CheckpointError) as caught:
            copy_companions("model", folder, output, trust_remote_code=False)
        check_message(caught.value, "LICENSE", "pipe")

    def test_a_link_to_nothing_is_refused(self, folder: Path, output: Path) -> None:
        (folder / "LICENSE").symlink_to("gone")
        with pytest.raises(CheckpointError) as caught:
            copy_companions("model", folder, output, trust_remote_code=False)
        check_message(caught.value, "LICENSE")

    def test_a_link_within_the_folder_is_copied_as_a_file(self, folder: Path, output: Path) -> None:
        (folder / "terms").write_text("terms")
        (folder / "LICENSE").symlink_to("terms")
        stage_companions(open_source(str(folder)), output)
        assert (output / "LICENSE").read_text() == "terms"
        assert not (output / "LICENSE").is_symlink()


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .helpers import NAME
class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"tokenizer_file": "tokenizer.json", "extra_file": "own.vocab"}
    def __init__(self, *args, extra_file=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = NAME + Path(extra_file).read_text()
"""


class TestCode:
    """Tokenizers that are Python files beside the checkpoint."""

    @pytest.fixture
    def coded(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        write(folder, "tokenization_own.py", CODE)
        write(folder, "helpers.py", 'NAME = "helped "')
        write(folder, "unrelated.py", "")
        write(folder, "own.vocab", "and owned")
        auto = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        edit_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="OwnTokenizer")
        return folder

    def test_with_trust_the_code_and_what_it_names_are_copied(self, coded: Path, output: Path) -> None:
        stage_companions(open_source(str(coded), trust_remote_code=True), output)
        assert {"tokenization_own.py", "helpers.py", "own.vocab"} <= names_in(output)
        assert "unrelated.py" not in names_in(output)
        tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
        assert tokenizer.name == "helped and owned"

    def test_without_trust_the_error_names_the_option_and_nothing_is_run(self, coded: Path, output: Path) -> None:
        (coded / "tokenization_own.py").write_text("raise SystemExit('run')")
        with pytest.raises(CheckpointError) as caught:
            stage_companions(open_source(str(coded)), output)
        check_message(caught.value, "tokenizer")
        assert "--trust-remote-code" in caught.value.next_step

    def test_where_transformers_own_class_does_the_config_names_no_code(self, coded: Path, output: Path) -> None:
        edit_json(coded / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        (coded / "tokenization_own.py").write_text("raise SystemExit('run')")
        stage_companions(open_source(str(coded)), output)
        assert not list(output.glob("*.py"))
        assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())
        assert AutoTokenizer.from_pretrained(output)("w7")["input_ids"] == [7]

    def test_code_that_is_missing_is_said(self, coded: Path, output: Path) -> None:
        (coded / "tokenization_own.py").unlink()
        with pytest.raises(CheckpointError) as caught:
            stage_companions(open_source(str(coded), trust_remote_code=True), output)
        check_message(caught.value, "tokenization_own.py")
