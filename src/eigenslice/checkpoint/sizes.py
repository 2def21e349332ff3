"""Sizes that a config announces, compared with the tensors that are there, before anything is built from them.

transformers builds any model that a config describes, even with a billion layers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from eigenslice.arch import has_table
from eigenslice.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

FEW = 256
"""Layers that a part of a model may have of which the checkpoint holds none: nobody has built a deeper one."""
MANY = 4096
"""The same for experts and heads."""
LABELS = 2**20
"""transformers makes a name for each."""
POSITIONS = 2**24
"""Llama 4 has 10 million; some types compute a table of them all."""
LARGEST = 2**31
SPARE = 2**24
"""Parameters that may be missing before a model is read: so few take no memory to speak of."""
LAYERS = re.compile(r"(^|_)(n_?)?(layers?|depths?|blocks)$|^attention_types$")
COUNTS = re.compile(r"(^|_)(n_|num_)?(experts?|heads?|groups?)$")
AT_MOST = (
    (re.compile(r"num_labels$"), LABELS),
    (re.compile(r"positions?$|position_embeddings$|seq_len(gth)?$|n_ctx$"), POSITIONS),
    (re.compile(r"(size|dim|rank|width|embd|d_model|inner|window)$"), LARGEST),
)
POSITIVE = re.compile(
    r"^(hidden_size|n_embd|d_model|vocab_size|intermediate_size|n_inner|ffn_dim|head_dim|max_position_embeddings"
    r"|n_positions|n_ctx|max_seq_len|num_hidden_layers|n_layers?|num_layers"
    r"|(num_)?attention_heads|num_key_value_heads|num_kv_heads|n_heads?)$"
)
"""Fields in which zero, a negative number or a truth value makes no model; in a list, zero may."""
ABOVE_ZERO = re.compile(
    r"^(factor|rope_theta|rotary_emb_base|(long|short)_factor|attention_factor|rope_local_base_freq)$"
)
SHARES = re.compile(r"^(partial_rotary_factor|rotary_pct)$|(dropout|pdrop)$")
EPSILON = re.compile(r"(^|_)(eps|epsilon)$")
PARTS_OF_TEXT = ("text_config", "llm_config", "language_config")
NUMBER_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
NUMBERED = re.compile(r"(?:^|\.)([A-Za-z_]\w*)\.(\d{1,9})\.")
EXPERT = re.compile(r"experts\.(\d{1,9})\.")
NO_TEXT = re.compile(r"vision|visual|image|audio|speech")
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")


def check_config(name: str, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a config.json that doesn't fit the tensors, or from which no model can be built.

    Args:
        name: Name of the checkpoint, for messages.
        config: Content of config.json.
        shapes: Shapes of all tensors.

    Raises:
        CheckpointError: a number is impossible, or much larger than anything that the tensors have.
    """
    layers = _most_layers(shapes)
    largest = max((max(shape, default=1) for shape in shapes.values()), default=1)
    numbers = {int(found[1]) for tensor in shapes for found in EXPERT.finditer(tensor)}
    text = _text(config)
    if config.get("quantization_config") is None:  # tensors of quantized weights have shapes of their own
        _compare(name, config, text, shapes, layers)
    limits = (max(FEW, layers), max(MANY, largest, len(numbers)))
    for path, field, value in _numbers(config):
        _check_number(name, path, field, value, limits)
    _check_divisions(name, text)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model."""
    return next((config[part] for part in PARTS_OF_TEXT if isinstance(config.get(part), dict)), config)


def _numbers(value: Any, path: str = "", field: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each number in a config, with the path to it and the last field's name in the path."""
    pending = [(value, path, field)]
    while pending:  # no recursion: the nesting comes from a file
        value, path, field = pending.pop()
        if isinstance(value, dict):
            pending += [(v, f"{path}.{k}".lstrip("."), str(k)) for k, v in value.items()]
        elif isinstance(value, list):
            pending += [(v, f"{path}[]", field) for v in value]
        elif isinstance(value, int | float):
            yield path, field, value


def _check_number(name: str, path: str, field: str, value: float, limits: tuple[int, int]) -> None:
    layers, counts = limits
    if math.isnan(value):
        raise _impossible(name, path, value, "numbers: NaN makes all that the model computes NaN")
    if POSITIVE.match(field) and (isinstance(value, bool) or value < (0 if path.endswith("[]") else 1)):
        raise _impossible(name, path, value, "a whole number above 0")
    if isinstance(value, bool):
        return
    if ABOVE_ZERO.match(field) and not 0 < value < math.inf:
        raise _impossible(name, path, value, "a finite number above 0")
    if SHARES.search(field) and not 0 <= value <= 1:
        raise _impossible(name, path, value, "a share from 0 to 1")
    if EPSILON.search(field) and not 0 <= value < math.inf:
        raise _impossible(name, path, value, "a finite number of at least 0")
    if isinstance(value, int):
        known = ((LAYERS, layers), (COUNTS, counts), *AT_MOST)
        limit = next((most for pattern, most in known if pattern.search(field)), None)
        if limit is not None and abs(value) > limit:
            raise _impossible(name, path, value, f"a number up to {limit}, by the tensors that are there")


def _check_divisions(name: str, text: Mapping[str, Any]) -> None:
    """Check the numbers that transformers divides by, or that count parts."""
    heads = _whole(text, "num_attention_heads", "n_head", "attention_heads", "n_heads")
    shared = _whole(text, "num_key_value_heads")
    if heads and shared and heads % shared:
        raise _impossible(name, "num_key_value_heads", shared, f"a divisor of the {heads} attention heads")
    experts = _whole(text, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _whole(text, "num_experts_per_tok", "moe_topk")
    if experts and chosen is not None and not 0 < chosen <= experts:
        raise _impossible(name, "num_experts_per_tok", chosen, f"a number from 1 to the {experts} experts")
    groups, few = _whole(text, "n_group"), _whole(text, "topk_group")
    if experts and groups is not None and (groups < 1 or experts % groups):
        raise _impossible(name, "n_group", groups, f"a divisor of the {experts} experts")
    if groups and few is not None and not 0 < few <= groups:
        raise _impossible(name, "topk_group", few, f"a number from 1 to the {groups} groups")
    width, rotary_dim = _whole(text, *WIDTHS), _whole(text, "rotary_dim")
    if heads and width and rotary_dim is not None and not 0 < rotary_dim <= width // heads:
        raise _impossible(name, "rotary_dim", rotary_dim, f"a number from 1 to the {width // heads} of a head")


def _whole(config: Mapping[str, Any], *fields: str) -> int | None:
    """The first of these fields that is a whole number."""
    values = (config.get(field) for field in fields)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _compare(name: str, config: Mapping[str, Any], text: Mapping[str, Any], shapes: Shapes, layers: int) -> None:
    """Compare layers, vocabulary and width with the tensors, where these have the names of a family with a table."""
    kind = text.get("model_type", config.get("model_type"))
    if not has_table(kind):
        return
    announced = _whole(text, *NUMBER_OF_LAYERS)
    if announced is not None and announced > layers:
        raise CheckpointError(
            f"{name}: the config says {announced} layers, the tensors are those of {layers}",
            allowed="weights that fit the config",
            next_step="check num_hidden_layers in config.json, or download the checkpoint again",
        )
    tensors = [t for t in shapes if EMBEDDINGS.search(t) and not NO_TEXT.search(t) and len(shapes[t]) == 2]
    if len(tensors) != 1:
        return
    rows, width = shapes[tensors[0]]
    said = _whole(text, "vocab_size") or rows, _whole(text, *WIDTHS) or width
    if config.get("model_type") == "eigenslice" or "word_embed_proj_dim" in text:
        said = said[0], width  # the stream of a sliced model is narrower than its config's
    if said != (rows, width):
        raise CheckpointError(
            f"{name}: {tensors[0]} is {rows, width}, the config says {said}",
            allowed="weights that fit the config",
            next_step="check that config.json and the weights belong together",
        )


def _most_layers(shapes: Shapes) -> int:
    """Return the number of layers in the language model's tensors: numbers behind one name, such as layers.7."""
    numbers_of: dict[str, set[int]] = {}
    for tensor in shapes:
        if not NO_TEXT.search(tensor) and (match := NUMBERED.search(tensor)):
            numbers_of.setdefault(tensor[: match.start(2)], set()).add(int(match[2]))
    return max((len(numbers) for numbers in numbers_of.values()), default=0)


def check_total(name: str, announced: int, stored: int) -> None:
    """Refuse a config of a model that is far larger than the files: transformers would invent the rest.

    If less is missing, transformers names the missing tensors.

    Args:
        name: Name of the checkpoint.
        announced: Parameters of the model that the config describes.
        stored: Count of numbers in the files.

    Raises:
        CheckpointError: it is.
    """
    if announced > 2 * stored + SPARE:
        raise CheckpointError(
            f"{name}: the config describes a model of {announced:,} parameters, the tensors hold {stored:,}",
            allowed="weights that fit the config",
            next_step="check that config.json and the weights belong together",
        )


def _impossible(name: str, path: str, value: float, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {path} is {value} in the config",
        allowed=allowed,
        next_step="check config.json, or download the checkpoint again",
    )
