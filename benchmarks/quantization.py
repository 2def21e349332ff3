"""Size and loss of slicing and quantization together: a dense and sliced models, in several number formats.

    python benchmarks/quantization.py DENSE SLICED... --types f16,q8_0,q4_0,q4_k,torchao-int8 --work WORK \\
        -o benchmarks/results/NAME.json

Loss: mean negative log-likelihood in nats per token, over `--samples` windows of `--seqlen` tokens of `--data`; each
window predicts its tokens 2 to T. GGUF types run in llama.cpp, which also rounds activations; torchao-int8 (8-bit
weights, by channel) and float32 run in transformers. Size: bytes of the weight files. A type that a width doesn't allow
is left out, with the reason.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenslice import CalibrationOptions, EigensliceError, ExportOptions, export_model
from eigenslice.data import evaluation_tokens
from eigenslice.export.gguf.llama_cpp import LlamaCpp

REFERENCE, TORCHAO = "float32", "torchao-int8"
Measured = tuple[int, float]
"""Bytes and loss."""


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def torch_loss(model: Any, rows: Tensor) -> float:
    """Mean negative log-likelihood of a model of transformers."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def measure_torch(model: str, kind: str, rows: Tensor, work: Path) -> Measured:
    """In transformers, as it is or through torchao, saved and loaded again."""
    if kind == REFERENCE:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return weight_bytes(Path(model)), torch_loss(loaded, rows)
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    config = TorchAoConfig(quant_type=Int8WeightOnlyConfig(version=2))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config)
        quantized.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return weight_bytes(Path(folder)), torch_loss(loaded, rows)


def measure_gguf(model: str, kind: str, rows: Tensor, work: Path) -> Measured:
    """In llama.cpp."""
    path = work / f"{Path(model).name}-{kind}.gguf"
    if not path.exists():
        export_model(ExportOptions(model=model, output=path, to="gguf", type=kind))
    vocabulary = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    total = 0.0
    with LlamaCpp(path, context=rows.shape[1] + 8) as runtime:
        for row in rows.tolist():
            total -= sum(runtime.log_probability(row[:i], row[i], vocabulary) for i in range(1, len(row)))
    return path.stat().st_size, total / (rows.shape[0] * (rows.shape[1] - 1))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All models in all types; what is there so far is written after each."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    config = AutoModelForCausalLM.from_pretrained(arguments.models[0]).config
    tokenizer = AutoTokenizer.from_pretrained(arguments.models[0])
    options = CalibrationOptions(data=arguments.data, samples=arguments.samples, seqlen=arguments.seqlen)
    tokens = evaluation_tokens(options, lambda: tokenizer, config)
    rows = torch.cat([batch.input_ids for batch in tokens.batches])
    result: dict[str, Any] = {"data": tokens.description, "rows": []}
    for model in arguments.models:
        for kind in [REFERENCE, *arguments.types]:
            entry: dict[str, Any] = {"model": Path(model).name, "type": kind}
            measure = measure_torch if kind in (REFERENCE, TORCHAO) else measure_gguf
            try:
                size, loss = measure(model, kind, rows, arguments.work)
                entry |= {"megabytes": round(size / 1e6, 1), "loss": round(loss, 4)}
            except EigensliceError as error:
                entry["refused"] = error.found
            result["rows"].append(entry)
            print(entry, flush=True)
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders; the first one's tokenizer is used for all")
    parser.add_argument("--types", type=lambda text: text.split(","), default=["f16", "q8_0", "q4_0", "q4_k", TORCHAO])
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
