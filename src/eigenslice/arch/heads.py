"""The order in which the rows of attention's weights belong to heads."""

from collections.abc import Sequence
from dataclasses import dataclass

Slot = tuple[str, int, int]
"""A run of rows: the part ("q", "k" or "v"), the key/value head, and the number of the query head behind it."""


@dataclass(frozen=True)
class HeadCounts:
    """Numbers of heads.

    Attributes:
        kv: Key/value heads.
        group: Query heads of each key/value head.
    """

    kv: int
    group: int

    @property
    def queries(self) -> int:
        """Number of query heads."""
        return self.kv * self.group


@dataclass(frozen=True)
class HeadRows:
    """The order of the rows of a weight: runs of equally many rows, each of one head.

    Attributes:
        parts: The parts that the weight has, in order: "q" for queries, "k" for keys, "v" for values.
        blocks: Number of blocks of heads. A block has all parts of its heads, then the next block begins. None is a
            block for each key/value head.
        modules: True if there is a module for each run of rows instead, in this order, named by its number.
    """

    parts: str
    blocks: int | None = 1
    modules: bool = False

    def slots(self, counts: HeadCounts) -> list[Slot]:
        """Return the runs of rows for so many heads, in order."""
        blocks = self.blocks or counts.kv
        each = counts.kv // blocks
        return [
            (part, head, query)
            for block in range(blocks)
            for part in self.parts
            for head in range(block * each, (block + 1) * each)
            for query in (range(counts.group) if part == "q" else [0])
        ]

    def kept(self, counts: HeadCounts, queries: Sequence[Sequence[int]]) -> list[int]:
        """Return the dense runs of rows that the runs of the smaller weight are, in order.

        Args:
            counts: Numbers of heads of the dense model.
            queries: For each kept key/value head, in order, the numbers of its kept query heads among all of them.
        """
        places = {slot: place for place, slot in enumerate(self.slots(counts))}
        fewer = HeadCounts(len(queries), len(queries[0]))
        result = []
        for part, head, query in self.slots(fewer):
            dense, number = divmod(queries[head][query], counts.group)
            result.append(places[part, dense, number if part == "q" else 0])
        return result

    def resized(self, rows: int, counts: HeadCounts, fewer: HeadCounts) -> int:
        """Return the number of rows of the smaller weight.

        Args:
            rows: Rows of the dense weight.
            counts: Numbers of heads of the dense model.
            fewer: Numbers of heads that are kept.
        """
        return rows // len(self.slots(counts)) * len(self.slots(fewer))


QUERIES = HeadRows("q")
KEYS = HeadRows("k")
VALUES = HeadRows("v")
QUERIES_KEYS_VALUES = HeadRows("qkv")
"""All queries, then all keys, then all values."""
BY_HEAD = HeadRows("qkv", blocks=None)
"""For each key/value head its queries, its key, its value."""


def separate(queries: str, keys: str, values: str, writer: str) -> dict[str, HeadRows]:
    """Return the rows of three readers and the columns of their writer."""
    return {queries: QUERIES, keys: KEYS, values: VALUES, writer: QUERIES}


def fused(reader: str, rows: HeadRows, writer: str) -> dict[str, HeadRows]:
    """Return the rows of one reader for all parts and the columns of its writer."""
    return {reader: rows, writer: QUERIES}


JOINED = "a norm over the queries of all heads, and one over their keys, joins heads"
ALIBI = "ALiBi's slopes depend on the number of a head and the count of heads"
