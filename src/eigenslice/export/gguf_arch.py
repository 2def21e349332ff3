"""Which of llama.cpp's architectures holds a model.

Stock results are held by the architecture of their own type. A result of eigenslice's class is the dense model with
narrower matrices and norms without a gain, so that the dense type's architecture holds it with gains of one, as long as
all blocks have the same number of MLP neurons. Where they differ, `deci` does: llama.cpp's name for the graph of Llama
with heads and neurons that are counted for each block (made for NVIDIA's Nemotron, in which they differ, too).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from eigenslice.errors import UnsupportedModelError
from eigenslice.modeling import SlicedConfig


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds a model_type.

    Attributes:
        arch: Its architecture there.
        interleaved: Whether the two numbers that a rotary angle turns lie side by side in a head (transformers has
            them half a head apart).
        any_width: Whether it runs hidden widths other than heads x head_dim.
        counted: Whether heads and neurons are given for each block.
    """

    arch: MODEL_ARCH
    interleaved: bool
    any_width: bool = True
    counted: bool = False

    @property
    def name(self) -> str:
        """llama.cpp's name for it."""
        return MODEL_ARCH_NAMES[self.arch]


LLAMA = Architecture(MODEL_ARCH.LLAMA, interleaved=True)
DECI = Architecture(MODEL_ARCH.DECI, interleaved=True, counted=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, interleaved=False, any_width=False),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, interleaved=False),
}
ROPE_TYPES = ("default", "linear", "llama3")
ALLOWED = "results saved as " + ", ".join(ARCHITECTURES) + ", or as eigenslice's class from these types"
ELSEWHERE = "run it with transformers or vLLM, or export --to openvino (docs/serving.md)"


def is_custom(config: Any) -> bool:
    """Whether a model is eigenslice's class. (By name: the class of a folder's own code is another one.)"""
    return config.model_type == SlicedConfig.model_type


def dense_config(config: Any) -> Any:
    """The config that knows rotary angles and vocabulary: in eigenslice's class it is the dense model's.

    Heads may be fewer than there: ask the model's own config for their number.
    """
    return config.text_config if is_custom(config) else config


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    dense = dense_config(config)
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def neurons_of(config: Any) -> list[int]:
    """MLP neurons of each block."""
    dense = dense_config(config)
    counts = config.neurons if is_custom(config) else None
    return list(counts or [dense.intermediate_size] * dense.num_hidden_layers)


def epsilon_of(config: Any) -> float:
    """Epsilon of the norms."""
    return config.norm_eps if is_custom(config) else config.rms_norm_eps


def architecture_of(config: Any) -> Architecture:
    """How llama.cpp holds this model.

    Raises:
        UnsupportedModelError: it doesn't, or not this variant.
    """
    dense = dense_config(config)
    kind = dense.model_type
    found = ARCHITECTURES.get(kind)
    if found is None:
        of = f" of a {kind!r} model" if is_custom(config) else ""
        raise UnsupportedModelError(
            f"llama.cpp can't run results saved as {config.model_type!r}{of}, or eigenslice doesn't write them for it",
            allowed=ALLOWED,
            next_step=ELSEWHERE,
        )
    reasons, own = list(_variants(dense)), []
    if is_custom(config):
        found = _holder(config, found)
        own = list(_custom_variants(config, kind, found))
    width = config.num_attention_heads * head_dim(config)
    if not found.any_width and config.hidden_size != width:
        raise UnsupportedModelError(
            f"llama.cpp refuses {kind!r} at hidden width {config.hidden_size}, other than heads x head_dim = {width}",
            allowed=ALLOWED,
            next_step=f"slice to a width that divides by the {config.num_attention_heads} heads: the result is then "
            "saved as llama",
        )
    if reasons or own:
        raise UnsupportedModelError(
            f"llama.cpp's {found.name!r} lacks a part of this {kind!r} model: " + "; ".join(reasons + own),
            allowed="full attention, SiLU, rotary angles of type "
            + ", ".join(ROPE_TYPES)
            + ("; a global basis, in qwen3 one number of MLP neurons" if is_custom(config) else ""),
            next_step=("slice with --basis global --form stock, or " if own and not reasons else "") + ELSEWHERE,
        )
    return found


def _holder(config: Any, found: Architecture) -> Architecture:
    """The architecture for a result of eigenslice's class, whose dense type has `found`.

    Llama's takes biases of queries, keys and values at any width, as Qwen2's doesn't.
    """
    if len(set(neurons_of(config))) > 1:
        return DECI
    return found if found.any_width else LLAMA


def _variants(config: Any) -> Iterator[str]:
    """What a type's architecture has no place for, of a stock or dense config."""
    layers = set(getattr(config, "layer_types", None) or ())
    windowed = "sliding_attention" in layers if layers else getattr(config, "sliding_window", None) is not None
    if windowed:
        yield f"a sliding window of {config.sliding_window} tokens"
    if config.hidden_act != "silu":
        yield f"the activation {config.hidden_act!r}"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        yield f"rotary angles of type {rope['rope_type']!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "heads that are turned in part"


def _custom_variants(config: Any, kind: str, found: Architecture) -> Iterator[str]:
    """What an architecture has no place for, of a config of eigenslice's class and a dense type."""
    if config.shortcuts or len(set(config.site_widths or ())) > 1:
        yield "matrices between the bases of its blocks (--basis per-block)"
    if config.reader_bias or config.head_bias or config.centered_embedding:
        yield "shifts of LayerNorms"
    if found is DECI and kind == "qwen3":
        yield "norms of queries and keys (its blocks have different numbers of MLP neurons)"
