"""Files for other runtimes: GGUF (llama.cpp), OpenVINO, ONNX. Each is run there and compared with transformers.

vLLM needs no file: it loads results as they are (docs/serving.md).
"""

import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from eigenslice.algebra.finite import all_finite
from eigenslice.checkpoint.companions import companions_of, copy_companions
from eigenslice.checkpoint.hub import hub_name, is_local
from eigenslice.checkpoint.loading import LoadedModel, load_model
from eigenslice.checkpoint.names import CONFIG
from eigenslice.checkpoint.source import locate
from eigenslice.errors import CheckpointError, EigensliceError, ExportError, OptionsError, first_line
from eigenslice.export.agreement import Agreement, Runtime
from eigenslice.options.exporting import ExportOptions
from eigenslice.runtime.output import refuse_overlap
from eigenslice.runtime.work_folder import WorkFolder, check_work_folder, work_folder

if TYPE_CHECKING:
    from eigenslice.export.graph import Graph

Progress = Callable[[str, int, int], None]
GRAPH_FILES = ("openvino_model.xml", "openvino_model.bin", "model.onnx", "model.onnx.data")
TOLERANCES = {"f32": 1e-3, "f16": 0.05}
"""Mean difference of log-probability, in nats, of a graph. Measured on SmolLM2-135M: see docs/serving.md."""


@dataclass(frozen=True)
class Export:
    """An exported file or folder.

    Attributes:
        output: Path of the file or folder.
        bytes: Its size.
        formats: Number of matrices in each number format.
        agreement: Agreement with transformers on the same rounded weights; None if it wasn't checked.
        unrounded: Agreement with transformers on the original weights; None if they weren't rounded, or not checked.
        tolerance: The allowed mean difference.
    """

    output: Path
    bytes: int
    formats: dict[str, int]
    agreement: Agreement | None = None
    unrounded: Agreement | None = None
    tolerance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


def export_model(options: ExportOptions, progress: Progress = lambda stage, done, total: None) -> Export:
    """Write a model for another runtime, and check it there.

    Args:
        options: The options of the command.
        progress: Called as a stage goes on.

    Raises:
        CheckpointError: the model can't be read.
        UnsupportedModelError: the runtime can't run it.
        OptionsError: a type that this model can't be stored in, or a package that isn't installed.
        ExportError: the format can't hold this model, or the runtime computes something else. Nothing is left then.
        OutputError: the output exists, or can't be written.
    """
    writers = {"gguf": _export_gguf, "openvino": _export_openvino, "onnx": _export_onnx}
    return writers[options.to](options, progress)


def _open(options: ExportOptions) -> tuple[Path, Any]:
    """The folder and the config of the model to export."""
    check_work_folder(options.output, inputs=[Path(options.model)])
    folder, gguf = locate(options.model)
    if gguf:
        raise CheckpointError(
            f"{options.model} is a GGUF file",
            allowed="a folder or a hub id, in safetensors",
            next_step="export the folder that `eigenslice slice` wrote",
        )
    refuse_overlap(options.output, [folder])
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # config classes raise all kinds
        raise CheckpointError(
            f"transformers can't read the config of {options.model} ({first_line(error)})",
            allowed="a folder as transformers or eigenslice saves it",
            next_step="check the folder; a model with its own code needs --trust-remote-code",
        ) from error
    return folder, config


def _load(options: ExportOptions) -> LoadedModel:
    """The model, in float32 on the CPU; its weights are finite."""
    loaded = load_model(options.model, "cpu", "float32", options.trust_remote_code)
    broken = [name for name, tensor in loaded.model.state_dict().items() if not all_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{options.model}: {broken[0]} has NaN or infinite numbers",
            allowed="finite weights",
            next_step="download or save the checkpoint again",
        )
    return loaded


def _work_folder(options: ExportOptions, names: Collection[str] = ()) -> AbstractContextManager[WorkFolder]:
    """Give the folder that an export works in. Files of a killed export are removed, because an export begins anew."""
    return work_folder(options.output, {"verb": "export", "model": options.model}, names)


def _export_gguf(options: ExportOptions, progress: Progress) -> Export:
    from eigenslice.export.agreement import check_tokens, compare, prompts, reference, require_agreement
    from eigenslice.export.gguf import llama_cpp
    from eigenslice.export.gguf.arch import architecture_of
    from eigenslice.export.gguf.types import round_weights, type_for
    from eigenslice.export.gguf.writing import Checkpoint, write_gguf

    folder, config = _open(options)
    architecture_of(config)
    kind = type_for(options.type or "f16", config.hidden_size)
    if options.check:
        llama_cpp.require()
    loaded = _load(options)
    tokenizer = loaded.tokenizer()
    hub = None if is_local(options.model) else hub_name(options.model)
    name = Path(hub.repository if hub else options.model).name
    with _work_folder(options) as work:
        path = work.result
        checkpoint = Checkpoint(folder, config, tokenizer, name, options.tokenizer_pre)
        formats = write_gguf(path, checkpoint, kind, progress)
        size = path.stat().st_size
        if not options.check:
            return Export(options.output, size, formats)
        sequences = prompts(tokenizer)
        unrounded = reference(loaded.model, sequences)
        round_weights(loaded.model, kind)
        rounded = reference(loaded.model, sequences)
        with llama_cpp.LlamaCpp(path, exact=options.type == "f32") as runtime:
            check_tokens(tokenizer, runtime.tokenize)
            agreement, cost = compare(runtime, sequences, [rounded, unrounded])
        require_agreement(agreement, kind.tolerance, "llama.cpp")
    return Export(options.output, size, formats, agreement, cost if options.type != "f32" else None, kind.tolerance)


def _type(options: ExportOptions, types: Collection[str]) -> str:
    """The number format of a graph."""
    name = options.type or "f32"
    if name not in types:
        raise OptionsError(
            f"--type {name} with --to {options.to}",
            allowed=" or ".join(types),
            next_step="choose one of these; docs/quantization.md has how to store fewer bits",
        )
    return name


def _export_openvino(options: ExportOptions, progress: Progress) -> Export:
    from eigenslice.export import openvino

    name = _type(options, openvino.TYPES)
    openvino.require()
    return _export_graph(
        options,
        progress,
        lambda folder, graph: openvino.write_openvino(folder, graph, openvino.TYPES[name]),
        openvino.OpenVino,
        name,
    )


def _export_onnx(options: ExportOptions, progress: Progress) -> Export:
    from eigenslice.export import onnx

    name = _type(options, onnx.TYPES)
    onnx.require()
    return _export_graph(options, progress, onnx.write_onnx, onnx.OnnxRuntime, name)


def _export_graph(
    options: ExportOptions,
    progress: Progress,
    write: Callable[[Path, "Graph"], None],
    runtime: Callable[[Path], Runtime],
    name: str,
) -> Export:
    """Write a graph with the files that go with it, and check it."""
    from eigenslice.export.agreement import compare, prompts, reference, require_agreement
    from eigenslice.export.graph import graph_of

    folder, _ = _open(options)
    loaded = _load(options)
    beside = companions_of(options.model, folder, options.trust_remote_code)  # as users of a graph expect
    names = {file.partition("/")[0] for file in [CONFIG, *beside, *GRAPH_FILES]}
    with _work_folder(options, names) as work:
        target = work.result
        target.mkdir()
        progress("tracing", 0, 1)
        try:
            write(target, graph_of(loaded.model))
        except (EigensliceError, OSError):
            raise
        except Exception as error:  # tracers and converters raise all kinds
            raise ExportError(
                f"--to {options.to} can't hold this {loaded.model.config.model_type!r} model ({first_line(error)})",
                allowed="models that torch.export traces and whose operations the format has",
                next_step="run it with transformers or vLLM (docs/serving.md)",
            ) from error
        progress("tracing", 1, 1)
        shutil.copyfile(folder / CONFIG, target / CONFIG)
        copy_companions(options.model, folder, target, options.trust_remote_code)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        matrices = {name: sum(p.ndim > 1 for p in loaded.model.parameters())}
        if not options.check:
            return Export(options.output, size, matrices)
        sequences = prompts(loaded.tokenizer())
        expected = reference(loaded.model, sequences)
        try:
            [agreement] = compare(runtime(target), sequences, [expected])
        except (EigensliceError, OSError):
            raise
        except Exception as error:  # runtimes raise all kinds
            raise ExportError(
                f"the runtime of --to {options.to} doesn't run this {loaded.model.config.model_type!r} model "
                f"({first_line(error)})",
                allowed="files that give logits for each token",
                next_step="nothing was written; report this with the model's config.json, or run it with transformers",
            ) from error
        require_agreement(agreement, TOLERANCES[name], options.to)
    return Export(options.output, size, matrices, agreement, tolerance=TOLERANCES[name])
