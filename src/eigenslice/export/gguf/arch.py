"""The choice of llama.cpp's architecture for a model.

Stock results are held by the architecture of their own type, or by an equivalent one (`gguf_table.py`). A result of
eigenslice's class is the dense model with narrower matrices and norms without a gain. So the dense type's architecture
holds it, with gains of one, if all blocks have the same number of MLP neurons. Otherwise `deci` holds it. This is
llama.cpp's name for the graph of Llama with heads and neurons counted for each block, made for NVIDIA's Nemotron.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gguf import MODEL_ARCH

from eigenslice.errors import UnsupportedModelError
from eigenslice.export.gguf.config import dense_config, head_dim, is_custom, neurons_of, window_period
from eigenslice.export.gguf.rope import rope_type, rotary_dim
from eigenslice.export.gguf.table import ARCHITECTURES, OWN, Architecture

ALLOWED = (
    "results saved as "
    + ", ".join(ARCHITECTURES)
    + ", or as eigenslice's class from "
    + ", ".join(kind for kind, architecture in ARCHITECTURES.items() if architecture.custom)
)
ELSEWHERE = "run it with transformers or vLLM, or export --to openvino (docs/serving.md)"


def architecture_of(config: Any) -> Architecture:
    """Return llama.cpp's architecture for this model.

    Raises:
        UnsupportedModelError: there is none for this type, or for this variant.
    """
    dense = dense_config(config)
    kind = dense.model_type
    architecture = ARCHITECTURES.get(kind)
    if architecture is None or (is_custom(config) and not architecture.custom):
        of = f" of a {kind!r} model" if is_custom(config) else ""
        raise UnsupportedModelError(
            f"llama.cpp can't run results saved as {config.model_type!r}{of}, or eigenslice doesn't write them for it",
            allowed=ALLOWED,
            next_step=ELSEWHERE,
        )
    own: list[str] = []
    if is_custom(config):
        architecture = _holder(config, architecture)
        own = list(_custom_variants(config, kind, architecture))
    reasons = list(_variants(dense, architecture))
    width = config.num_attention_heads * head_dim(config)
    if not architecture.any_width and config.hidden_size != width:
        raise UnsupportedModelError(
            f"llama.cpp refuses {kind!r} at hidden width {config.hidden_size}, other than heads x head_dim = {width}",
            allowed=ALLOWED,
            next_step=f"slice to a width that divides by the {config.num_attention_heads} heads: the result is then "
            "saved as llama"
            if kind == "qwen2"
            else f"cut heads along with the width where the type allows it, or only MLP neurons, or {ELSEWHERE}",
        )
    if reasons or own:
        raise UnsupportedModelError(
            f"llama.cpp's {architecture.name!r} lacks a part of this {kind!r} model: " + "; ".join(reasons + own),
            allowed=f"full attention, the activation {' or '.join(architecture.activations)}, rotary angles of type "
            + ", ".join(architecture.rope_types)
            + ("; a global basis, in qwen3 one number of MLP neurons" if is_custom(config) else ""),
            next_step=("slice with --basis global --form stock, or " if own and not reasons else "") + ELSEWHERE,
        )
    return architecture


def _holder(config: Any, architecture: Architecture) -> Architecture:
    """Return the architecture for a result of eigenslice's class; the dense type has `architecture`.

    Llama's architecture takes biases of queries, keys and values at any width; Qwen2's doesn't.
    """
    if not architecture.any_width:
        architecture = OWN
    counted = len(set(neurons_of(config))) > 1
    return replace(architecture, arch=MODEL_ARCH.DECI, counted=True) if counted else architecture


def _variants(config: Any, architecture: Architecture) -> Iterator[str]:
    """Return parts of a stock or dense config that the type's architecture has no place for."""
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in layers if layers else window is not None
    if architecture.windows:
        if window_period(config) is None:
            yield "sliding windows in other layers than all but each n-th"
    elif windowed and window < config.max_position_embeddings:
        yield f"a sliding window of {window} tokens"
    activation = getattr(config, architecture.activation)
    if activation not in architecture.activations:
        yield f"the activation {activation!r}"
    if rope_type(config) not in architecture.rope_types:
        yield f"rotary angles of type {rope_type(config)!r}"
    if rotary_dim(config) != head_dim(config) and not architecture.partly_rotary:
        yield "heads that are rotated in part"
    for refusal in architecture.refusals:
        if refusal.when(config):
            yield refusal.reason


def _custom_variants(config: Any, kind: str, architecture: Architecture) -> Iterator[str]:
    """Return parts of a config of eigenslice's class that the architecture has no place for."""
    if config.shortcuts or len(set(config.site_widths or ())) > 1:
        yield "matrices between the bases of its blocks (--basis per-block)"
    if config.reader_bias or config.head_bias or config.centered_embedding:
        yield "shifts of LayerNorms"
    if architecture.counted and kind == "qwen3":
        yield "norms of queries and keys (its blocks have different numbers of MLP neurons)"
