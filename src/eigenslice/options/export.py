"""Options of `eigenslice export`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from eigenslice.options.paths import UserPath


class ExportOptions(BaseModel):
    """What to write for another runtime.

    Attributes:
        model: A folder or a hub id.
        output: The file (gguf) or folder (openvino, onnx) to write; must not exist.
        to: The format.
        type: What numbers are stored in; None is float16 (gguf) or float32 (openvino, onnx).
        check: Run the result in its runtime and compare it with transformers.
        tokenizer_pre: llama.cpp's word for how the tokenizer splits text; None finds it (gguf).
        trust_remote_code: Let the checkpoint run its own code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: UserPath
    to: Literal["gguf", "openvino", "onnx"]
    type: str | None = None
    check: bool = True
    tokenizer_pre: str | None = None
    trust_remote_code: bool = False
