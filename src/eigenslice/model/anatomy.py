"""The anatomy of a dense model: its sizes, sites and ties, known without its weights."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Size

from eigenslice.arch import Sublayer, Table, lookup
from eigenslice.arch.heads import HeadCounts
from eigenslice.checkpoint.empty import empty_model
from eigenslice.model.block_kinds import Kind, block_kinds

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Anatomy:
    """Sizes, sites and ties of a dense model.

    Attributes:
        config: transformers' config of the model.
        table: Table of the model's architecture.
        shapes: Shape of each stored parameter by transformers' name; a tied head isn't stored.
        tied: True if embedding and head are one matrix.
        fixed_positions: Number of rows of each table of positions that no checkpoint holds, by the table's name.
        in_float32: Last parts of the names of tensors that transformers keeps in float32 beside 16-bit weights.
        kinds: Kind of each block. Blocks of one kind compute the same with the same weights.
        dropped_tokens: Number of the checkpoint's tokens that are left out; config and shapes are of the others.
    """

    config: Any
    table: Table
    shapes: dict[str, Shape]
    tied: bool
    fixed_positions: dict[str, int]
    in_float32: frozenset[str]
    kinds: tuple[Kind, ...]
    dropped_tokens: int = 0

    @classmethod
    def of_config(cls, config: Any) -> "Anatomy":
        """Return the anatomy of the model that transformers builds from a config, tied as the config says.

        Raises:
            UnsupportedModelError: no table is known for the config.
            CheckpointError: transformers can't build the model.
        """
        return cls.of_model(config, empty_model(config), tied=bool(config.tie_word_embeddings))

    @classmethod
    def of_model(cls, config: Any, model: Any, *, tied: bool, dropped_tokens: int = 0) -> "Anatomy":
        """Return the anatomy of a model that transformers has built.

        Args:
            config: The model's config.
            model: The model; its parameters may be on the meta device.
            tied: True if embedding and head are one matrix.
            dropped_tokens: Number of the checkpoint's tokens that the config doesn't count, see `Source.dropped_rows`.
        """
        table = lookup(config)
        shapes = parameter_shapes(model)
        if tied:
            del shapes[table.lm_head + ".weight"]
        positions = {}
        if table.sinusoids:
            positions[table.sinusoids + ".weights"] = len(model.get_submodule(table.sinusoids).weights)
        in_float32 = frozenset(model._keep_in_fp32_modules_strict or ())
        kinds = block_kinds(config, model, table.layers)
        return cls(config, table, shapes, tied, positions, in_float32, kinds, dropped_tokens)

    @cached_property
    def width(self) -> int:
        """Hidden size."""
        return self.shapes[self.table.embeddings[0] + ".weight"][1]

    @cached_property
    def block_count(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def sites(self) -> tuple[tuple[Sublayer, ...], ...]:
        """Sublayers at each site of a block, in the order of the stream."""
        return self.table.sites(self.config)

    @cached_property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.table.epsilon(self.config)

    @property
    def layer_norm(self) -> bool:
        """True if the norms are LayerNorms."""
        return self.table.norm == "layer"

    @cached_property
    def neuron_count(self) -> int:
        """Number of neurons in each MLP, or in each expert; 0 if the table doesn't say that they can be cut."""
        return self._columns(self.table.mlp.neuron_writer)[-1]

    @cached_property
    def expert_count(self) -> int:
        """Number of experts in each mixture; 0 if there are none."""
        *experts, _ = self._columns(self.table.mlp.neuron_writer)
        return experts[0] if experts else 0

    @cached_property
    def expert_groups(self) -> int:
        """Number of groups of experts, of each of which equally many experts stay; 1 without groups."""
        return int((self.table.groups_field and getattr(self.config, self.table.groups_field)) or 1)

    @cached_property
    def fewest_experts(self) -> int:
        """Least number of experts that a mixture needs, so that each token finds as many as before; 0 without any."""
        if not self.expert_count:
            return 0
        top, groups = int(self.config.num_experts_per_tok), self.expert_groups
        if groups == 1:
            return top
        return groups * max(2, -(-top // int(self.config.topk_group or groups)))

    @cached_property
    def shared_neuron_count(self) -> int:
        """Number of neurons in the shared experts that are cut with the experts; 0 if there are none."""
        return self._columns(self.table.mlp.shared_writer)[-1]

    @cached_property
    def kv_head_count(self) -> int:
        """Number of key/value heads in each block; 0 if the table doesn't say that they can be cut."""
        return self.head_counts.kv if self.head_counts else 0

    @cached_property
    def head_counts(self) -> HeadCounts | None:
        """Numbers of heads in each block; None if the table doesn't say that heads can be cut."""
        return self.table.head_counts(self.config)

    @property
    def neurons_per_block(self) -> tuple[int, ...]:
        """Number of MLP neurons in each block."""
        return (self.neuron_count,) * self.block_count

    @cached_property
    def neuron_rows(self) -> int:
        """Rows of all weights that an MLP's neurons read by, in the first block; 0 where they aren't fitted."""
        mlp, names = self.table.mlp, self.names_in_block(0)
        if not mlp.can_cut_neurons or mlp.stacked:
            return 0
        weights = {name: self.shapes[names[mlp.weight(name)]] for name in mlp.readers if mlp.weight(name) in names}
        return sum(mlp.transpose_shape(name, shape)[0] for name, shape in weights.items())

    @cached_property
    def parameters(self) -> int:
        """Number of the checkpoint's parameters, with the rows of all tokens; a tied head counts once."""
        return self.remaining_parameters + sum(self.dropped_parameters.values())

    @cached_property
    def remaining_parameters(self) -> int:
        """Number of parameters without the rows of tokens that are left out; a tied head counts once."""
        return sum(Size(shape).numel() for shape in self.shapes.values())

    @cached_property
    def tokens(self) -> int:
        """Number of rows of the embedding."""
        return self.shapes[self.table.embeddings[0] + ".weight"][0]

    @cached_property
    def vocabulary_parameters(self) -> dict[str, int]:
        """Parameters of embedding and head, which have a row for each token, by the tensor's name."""
        names = [self.table.embeddings[0] + ".weight", self.table.lm_head + ".weight", self.table.lm_head + ".bias"]
        return {name: Size(self.shapes[name]).numel() for name in names if name in self.shapes}

    @cached_property
    def dropped_parameters(self) -> dict[str, int]:
        """Parameters in the rows of tokens that are left out, by the tensor's name."""
        return {name: size // self.tokens * self.dropped_tokens for name, size in self.vocabulary_parameters.items()}

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """Number of parameters of each block."""
        names = map(self.names_in_block, range(self.block_count))
        return tuple(sum(Size(self.shapes[name]).numel() for name in of_block.values()) for of_block in names)

    @property
    def blocks_alike(self) -> bool:
        """True if all blocks are of one kind."""
        return len(set(self.kinds)) == 1

    @property
    def can_drop_blocks(self) -> bool:
        """True if blocks can be left out: there are several, and they don't depend on their numbers."""
        numbered = self.table.numbered and getattr(self.config, self.table.numbered)
        return self.block_count > 1 and not numbered

    @property
    def can_stay_tied(self) -> bool:
        """True if one matrix can still be embedding and head when the norms are folded."""
        return self.tied and not self.table.embedding_norm and not self.carries_shifts

    @property
    def reader_bias(self) -> bool:
        """True if folding gives every reader a bias, because the norms have a shift."""
        return f"{self.table.final_norm}.bias" in self.shapes

    @property
    def carries_shifts(self) -> bool:
        """True if folded shifts reach experts without biases through the norm, see `DenseModel.as_modules`.

        The stream's coordinates have to sum to zero then, in every basis (`layer_norm_basis`).
        """
        return self.reader_bias and bool(self.table.mlp.stacked)

    def keeps_bias(self, name: str, *, stock: bool) -> bool:
        """Return whether a reader's bias is stored: the dense model has it, or it holds the norm's shift.

        Args:
            name: Name of the bias.
            stock: True if the class has the dense model's biases only.
        """
        return name in self.shapes or (self.reader_bias and not stock)

    def keeps_float32(self, name: str) -> bool:
        """Return whether transformers keeps a tensor in float32 beside 16-bit weights."""
        return any(re.search(rf"(^|\.){part}($|\.)", name) for part in self.in_float32)

    def names_in_block(self, index: int) -> dict[str, str]:
        """Return the full names of a block's parameters, by the names relative to the block."""
        prefix = f"{self.table.layers}.{index}."
        return {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}

    def _columns(self, writer: str | None) -> list[int]:
        """Return the number of neurons that an MLP's writer reads, behind the number of experts.

        The number is 0 if no neurons can be cut.
        """
        mlp = self.table.mlp
        if not mlp.can_cut_neurons or writer is None:
            return [0]
        names = (f"{self.table.layers}.{block}.{mlp.weight(writer)}" for block in range(self.block_count))
        shape = next((self.shapes[name] for name in names if name in self.shapes), None)
        if shape is None:
            return [0]
        *experts, _, neurons = mlp.transpose_shape(writer, shape)
        return [*experts, neurons]


def parameter_shapes(model: Any) -> dict[str, Shape]:
    """Return the shape of each parameter of a model by name; a tied head has its own entry."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
