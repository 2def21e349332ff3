"""The dense model's config with some of its blocks left out.

The other blocks get new numbers, and must stay what they are. Lists with an entry for each block lose entries. Fields
that say by a number which blocks are of a kind, such as `first_k_dense_replace`, count the kept blocks of this kind.
`why_blocks_stay` checks the outcome: transformers builds the model, and each block must be of its old kind.
"""

from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from eigenslice.model.anatomy import Anatomy

OWN_FIELDS = frozenset(
    (
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "auto_map",
        "transformers_version",
        "dtype",
        "torch_dtype",
    )
)
"""Fields of a config that are about its own folder."""
NUMBERS_OF_BLOCKS = ("mlp_only_layers", "moe_layers")
"""Fields with the numbers of the blocks of a kind."""
BY_NUMBER = "per_layer_config"
"""Field with a dictionary of values by the block's number."""
COUNTS = ("first_k_dense_replace", "max_window_layers")
"""Fields with the number of blocks of a kind, which come before all others."""
PATTERNS = "attention_types"
"""GPT-Neo's field with a pattern of kinds and its repetitions."""


def dense_config(anatomy: Anatomy, kept: Sequence[int]) -> dict[str, Any]:
    """Return the dense config with some of the blocks.

    Fields of its folder and its old weights are left out, and fields that every config has anyway.

    Args:
        anatomy: The dense model.
        kept: Numbers of the blocks that are kept, ascending.
    """
    common = PreTrainedConfig().to_dict()
    values = {
        key: value
        for key, value in anatomy.config.to_dict().items()
        if key not in OWN_FIELDS and (key not in common or common[key] != value)
    }
    if len(kept) == anatomy.block_count:
        return values
    name = "num_hidden_layers"
    count = {type(anatomy.config).attribute_map.get(name, name): len(kept)}
    return values | _of_blocks(values, kept, anatomy.block_count) | _experts(values, kept) | count


def has_entry_per_block(field: str, value: Any, blocks: int) -> bool:
    """Return whether the value of a config's field is a list with as many entries as there are blocks, but of ids."""
    return isinstance(value, list) and len(value) == blocks and not field.endswith(("token_id", "token_ids"))


def _of_blocks(values: dict[str, Any], kept: Sequence[int], blocks: int) -> dict[str, Any]:
    """Return the changed fields of a config that say which blocks are of which kind."""
    changed: dict[str, Any] = {}
    places = {block: place for place, block in enumerate(kept)}
    for key, value in values.items():
        if value is None:
            continue
        if key in NUMBERS_OF_BLOCKS:
            changed[key] = [places[block] for block in value if block in places]
        elif key == BY_NUMBER and value:
            changed[key] = {str(places[int(n)]): of_block for n, of_block in value.items() if int(n) in places}
        elif key in COUNTS and value < blocks:
            changed[key] = sum(block < value for block in kept)
        elif key == PATTERNS:
            every = [kind for pattern, times in value for _ in range(times) for kind in pattern]
            changed[key] = [[[every[block] for block in kept], 1]]
        elif has_entry_per_block(key, value, blocks):
            changed[key] = [value[block] for block in kept]
    return changed


def _experts(values: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the changed fields of a config that give experts to every n-th block.

    The field n becomes 1, and the blocks without experts are listed. Llama 4 lists the blocks with experts. There n
    counts for other runtimes only, and is right if any n is.
    """
    step = values.get("decoder_sparse_step", 1)
    if step > 1:
        plain = {block for block in kept if (block + 1) % step or block in (values.get("mlp_only_layers") or ())}
        return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n, block in enumerate(kept) if block in plain]}
    if values.get("interleave_moe_layer_step") and values.get("moe_layers") is not None:
        mixtures = [n for n, block in enumerate(kept) if block in values["moe_layers"]]
        steps = (n for n in range(1, len(kept) + 1) if mixtures == [*range(n - 1, len(kept), n)])
        return {"interleave_moe_layer_step": next(steps, values["interleave_moe_layer_step"])}
    return {}
