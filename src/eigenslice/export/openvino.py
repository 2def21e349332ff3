"""Writing a model for OpenVINO, as OpenVINO GenAI's LLMPipeline and Optimum's OVModelForCausalLM read it.

Keys and values are *state* of the model: a call passes new tokens only. `beam_idx` says which sequence each row goes on
from (0, 1, 2, ... unless beams are searched).
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eigenslice.errors import OptionsError
from eigenslice.export.graph import INPUTS, LOGITS, Graph

TYPES = {"f32": False, "f16": True}
"""True if weights are compressed to float16."""
FILE = "openvino_model.xml"
BEAM = "beam_idx"


def require() -> Any:
    """The module openvino.

    Raises:
        OptionsError: it isn't installed.
    """
    try:
        return import_module("openvino")
    except ImportError as error:
        raise OptionsError(
            f"--to openvino needs OpenVINO, which can't be imported ({error})",
            allowed="openvino 2026.4",
            next_step="pip install 'eigenslice[openvino]'",
        ) from error


def write_openvino(folder: Path, graph: Graph, compress: bool) -> None:
    """Write openvino_model.xml and .bin.

    Args:
        folder: Where to.
        graph: The model.
        compress: Store weights in float16.
    """
    openvino = require()
    with torch.no_grad():
        program = torch.export.export(graph.module, graph.arguments, dynamic_shapes=graph.dynamic, strict=False)
    try:
        model = openvino.convert_model(program)
    except openvino.frontend.OpConversionFailure as error:  # its last line names the operations
        raise RuntimeError(str(error).strip().splitlines()[-1].lstrip("- ")) from error
    for port, name in zip(model.inputs, [*INPUTS, *graph.past], strict=True):
        port.get_tensor().set_names({name})
    for name, example in zip(graph.past, graph.arguments[-1], strict=True):
        # The converter forgets the number of heads, which the beginning of a state has to have
        _, heads, _, width = example.shape
        model.input(name).get_node().set_partial_shape(openvino.PartialShape([-1, heads, -1, width]))
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.outputs, [LOGITS, *graph.present], strict=True):
        port.get_tensor().set_names({name})
    _make_stateful(openvino, model, graph)
    openvino.save_model(model, folder / FILE, compress_to_fp16=compress)


def _make_stateful(openvino: Any, model: Any, graph: Graph) -> None:
    """Turn past and present into variables, each row of which goes on from the row that `beam_idx` names."""
    op = openvino.opset13
    beam = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    model.add_parameters([beam])
    for name in graph.past:
        past = model.input(name)
        readers = past.get_target_inputs()
        chosen = op.gather(past, beam, op.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    transformations = import_module("openvino._offline_transformations")
    transformations.apply_make_stateful_transformation(model, dict(zip(graph.past, graph.present, strict=True)))
    # A variable starts without tokens, but with as many rows as the input
    ids = model.input(INPUTS[0])
    rows = op.gather(op.shape_of(ids), op.constant([0], dtype=np.int64), op.constant(0, dtype=np.int64))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            heads, width = shape[1].get_length(), shape[3].get_length()
            rest = (op.constant([size], dtype=np.int64) for size in (heads, 0, width))
            empty = op.constant(0, dtype=node.get_output_element_type(0).to_dtype())
            node.set_arguments([op.broadcast(empty, op.concat([rows, *rest], 0))])
    model.validate_nodes_and_infer_types()


class OpenVino:
    """An exported folder, loaded on the CPU with float32 arithmetic.

    Args:
        folder: The folder.
        threads: CPU threads.
        exact: Compute, and keep keys and values, in float32; else as OpenVINO chooses for this CPU.
    """

    def __init__(self, folder: Path, threads: int = 1, exact: bool = True) -> None:
        openvino = require()
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if exact:
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._request = openvino.Core().compile_model(folder / FILE, "CPU", options).create_infer_request()
        self._seen: list[int] = []

    def logits(self, ids: Sequence[int]) -> Any:
        """Return logits (tokens, vocabulary) of the tokens behind the last call's tokens, if the text goes on."""
        if self._seen != list(ids[: len(self._seen)]) or len(self._seen) >= len(ids):
            self._request.reset_state()
            self._seen = []
        new = np.array([ids[len(self._seen) :]], dtype=np.int64)
        self._request.infer(
            {
                "input_ids": new,
                "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
                "position_ids": np.arange(len(self._seen), len(ids), dtype=np.int64)[None],
                BEAM: np.zeros(1, dtype=np.int32),
            }
        )
        self._seen = list(ids)
        logits = self._request.get_tensor(LOGITS).data
        if logits.shape[:2] != new.shape:
            raise RuntimeError(f"logits of shape {logits.shape} for {new.shape[1]} tokens")
        return logits[0]

    def next_tokens(self, ids: Sequence[int], likely: int) -> dict[int, float]:
        """Log-probabilities, in nats, of the most likely tokens after these; the first one is the most likely."""
        values, tokens = torch.from_numpy(self.logits(ids)[-1].copy()).double().log_softmax(-1).topk(likely)
        return dict(zip(tokens.tolist(), values.tolist(), strict=True))
