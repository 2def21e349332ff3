"""What a table says about an architecture: who reads the residual stream, who writes it, where it is normed.

Names are module paths as transformers builds the model: relative to the model for the outer ones, relative to
a decoder layer for a sublayer's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def always(config: Any) -> bool:
    """The condition of a stock form without one."""
    return True


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """Attention or MLP: what stands between a norm and the addition to the residual stream."""

    norm: str
    """The norm whose output the sublayer reads."""
    modules: tuple[str, ...]
    """Modules called one after the other; the first one's input is the norm's output."""
    readers: tuple[str, ...]
    """Linear layers whose input is the norm's output."""
    writers: tuple[str, ...]
    """Linear layers whose output is added to the residual stream."""
    inner: tuple[str, ...] = ()
    """Modules with parameters that touch the stream at neither end; kept as they are."""
    neurons: str | None = None
    """Field of the config with the number of neurons, where they can be cut: neuron i is row i of every reader and
    column i of the writer, and nothing in between joins two of them."""


@dataclass(frozen=True, kw_only=True)
class StockForm:
    """A config class of transformers that can hold a sliced model of this architecture."""

    model_type: str
    applies: Callable[[Any], bool] = always
    """Whether the mathematics of the dense config is expressible as this type."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Config values that this type needs to be the same mathematics."""
    zero_biases: tuple[str, ...] = ()
    """Linear layers (relative to a decoder layer) that this type gives a bias which the source doesn't have."""
    portable: bool = True
    """Whether llama.cpp and vLLM are known to run this type at widths other than heads x head_dim."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A variant that breaks the mathematics."""

    when: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """An architecture, as data."""

    model_type: str
    norm: Literal["rms", "layer"]
    eps: str | float
    """The norms' epsilon: a field of the config, or the number that transformers hard-codes."""
    embeddings: tuple[str, ...]
    """Token embedding first, then learned positions if there are any; all write the stream."""
    layers: str
    final_norm: str
    head: str
    attention: Sublayer
    mlp: Sublayer
    parallel: bool | str = False
    """Whether attention and MLP read the same stream; or the boolean field of the config that says so."""
    dropout: str | None = None
    """Field of the config with the dropout on what sublayers add to the stream (training only)."""
    stock: tuple[StockForm, ...] = ()
    """Stock forms, the preferred one first."""
    refusals: tuple[Refusal, ...] = ()

    def is_parallel(self, config: Any) -> bool:
        """Whether a block of this model has one site (parallel) instead of two."""
        return getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel

    def epsilon(self, config: Any) -> float:
        """The epsilon of this model's norms."""
        return float(getattr(config, self.eps) if isinstance(self.eps, str) else self.eps)

    def sites(self, config: Any) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers at each site of a block, in the order in which the stream passes the sites."""
        if self.is_parallel(config):
            return ((self.attention, self.mlp),)
        return ((self.attention,), (self.mlp,))
