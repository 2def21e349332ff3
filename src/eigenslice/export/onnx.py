"""Writing a model as ONNX for ONNX Runtime: past keys and values are inputs, present keys and values are outputs."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eigenslice.errors import OptionsError
from eigenslice.export.graph import INPUTS, LOGITS, Graph

TYPES = ("f32",)
FILE = "model.onnx"


def require() -> Any:
    """The module onnxruntime; onnxscript, which torch exports with, is also there.

    Raises:
        OptionsError: they aren't installed.
    """
    try:
        import_module("onnxscript")
        return import_module("onnxruntime")
    except ImportError as error:
        raise OptionsError(
            f"--to onnx needs onnxscript and ONNX Runtime ({error})",
            allowed="onnxscript 0.7 and onnxruntime 1.32",
            next_step="pip install 'eigenslice[onnx]'",
        ) from error


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keep a library's warnings in its log off the screen (torch misses torchvision)."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def write_onnx(folder: Path, graph: Graph) -> None:
    """Write model.onnx; with more than 2 GB the weights are in a file beside it."""
    require()
    with warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of torch's own deprecated parts
        program = torch.onnx.export(
            graph.module,
            graph.arguments,
            dynamo=True,
            dynamic_shapes=graph.dynamic,
            input_names=[*INPUTS, *graph.past],
            output_names=[LOGITS, *graph.present],
            verbose=False,
        )
    assert program is not None
    program.save(folder / FILE)


class OnnxRuntime:
    """An exported folder, loaded on the CPU.

    Args:
        folder: The folder.
        threads: CPU threads.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        self._past = {i.name: i.shape for i in self._session.get_inputs() if i.name not in INPUTS}
        self._seen: list[int] = []
        self._state: dict[str, Any] = {}

    def logits(self, ids: Sequence[int]) -> Any:
        """Return logits (tokens, vocabulary) of the tokens behind the last call's tokens, if the text goes on."""
        if not self._seen or self._seen != list(ids[: len(self._seen)]) or len(self._seen) >= len(ids):
            self._seen = []
            self._state = {name: np.zeros((1, s[1], 0, s[3]), dtype=np.float32) for name, s in self._past.items()}
        inputs = {
            "input_ids": np.array([ids[len(self._seen) :]], dtype=np.int64),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            "position_ids": np.arange(len(self._seen), len(ids), dtype=np.int64)[None],
        }
        logits, *present = self._session.run(None, inputs | self._state)
        self._state = dict(zip(self._past, present, strict=True))
        self._seen = list(ids)
        return logits[0]

    def next_tokens(self, ids: Sequence[int], likely: int) -> dict[int, float]:
        """Log-probabilities, in nats, of the most likely tokens after these; the first one is the most likely."""
        values, tokens = torch.from_numpy(self.logits(ids)[-1].copy()).double().log_softmax(-1).topk(likely)
        return dict(zip(tokens.tolist(), values.tolist(), strict=True))
