"""Options of `eigenslice export`."""

from typing import Annotated, Literal

from eigenslice.options.common import TrustCheckpoint
from eigenslice.options.flags import RESULT, Option, Options
from eigenslice.options.paths import UserPath


class ExportOptions(Options):
    """A model to write for another runtime."""

    model: Annotated[str, Option("A folder or a hub id, sliced or dense.", argument=True)]
    output: Annotated[UserPath, Option("File (gguf) or folder to write; must not exist.", flags=("--output", "-o"))]
    to: Annotated[Literal["gguf", "openvino", "onnx"], Option("For llama.cpp; for OpenVINO; for ONNX Runtime.")]
    type: Annotated[
        str | None,
        Option(
            "Numbers to store. gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k, q4_k; the "
            "hidden width must divide by 32 (q8_0 to q4_0) or 256 (K-quants). openvino: f32, f16. onnx: f32.",
            RESULT,
            "f16 for gguf, f32 for the others",
        ),
    ] = None
    check: Annotated[
        bool,
        Option("Run the result in its runtime and compare its log-probabilities with transformers'.", RESULT),
    ] = True
    tokenizer_pre: Annotated[
        str | None,
        Option("llama.cpp's word for how the tokenizer splits text (gguf).", RESULT, "found from the tokenizer"),
    ] = None
    trust_remote_code: TrustCheckpoint = False
