"""Dense models with tokenizers of each kind, and slicing with fewer tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import SliceResult, slice_model
from tests import tiny
from tests.vocabulary import kinds

PADDED = 24
"""Rows of the embedding that the tokenizer has no tokens for."""
TEXT = kinds.sentences(90, seed=5, nouns=kinds.NOUNS[:4])

Dense = Callable[[str, str], Path]
Run = Callable[..., SliceResult]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Gives the folder of a dense model of a case with a tokenizer of a kind."""
    folders: dict[tuple[str, str], Path] = {}

    def get(case: str, kind: str) -> Path:
        if (case, kind) not in folders:
            folder = tmp_path_factory.mktemp(f"{case}-{kind}")
            tokenizer, model = kinds.KINDS[kind](), tiny.CASES[case]
            rows = tokenizer.get_vocab_size() + PADDED
            config = model.config | model.extra | {"vocab_size": rows, "max_position_embeddings": 512}
            built = tiny.tiny_model(model.model_type, config)
            built.generation_config = GenerationConfig(
                bos_token_id=1, eos_token_id=[2, rows - PADDED - 1], pad_token_id=0, suppress_tokens=[300, 301]
            )
            built.save_pretrained(folder)
            kinds.save(tokenizer, folder)
            folders[case, kind] = folder
        return folders[case, kind]

    return get


@pytest.fixture
def run(dense: Dense, tmp_path: Path) -> Run:
    """Slices such a model at full width, if nothing else is asked for; calibrated on the text, and on its tokens."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)

    def slice_it(case: str = "llama", kind: str = "byte-level", **options: Any) -> SliceResult:
        given: dict[str, Any] = {
            "model": str(dense(case, kind)),
            "output": tmp_path / f"out-{len(list(tmp_path.iterdir()))}",
            "calibration": CalibrationOptions(data=str(file), samples=16, seqlen=32),
            "keep": 1.0,
            "vocabulary_from": str(file),
        }
        return slice_model(SliceOptions(**given | options))

    return slice_it
