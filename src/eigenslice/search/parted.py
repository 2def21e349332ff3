"""Streams that part: the same sequences with and without a change to one block."""

from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.stream.walk import Site

TOKENS = 2_048
"""Tokens that losses are measured on."""


def held_out_first(batches: list[Batch]) -> list[Batch]:
    """Return the held-out sequences, shortened to about `TOKENS` together (not if padded), and then the others."""
    held_out = [batch for batch in batches if batch.group == HELD_OUT_GROUP]
    share = min(1.0, TOKENS / sum(batch.tokens for batch in held_out))
    shortened = []
    for batch in held_out:
        whole = batch.input_ids.shape[1]
        length = whole if batch.attention_mask is not None else max(1, int(share * whole))
        shortened.append(Batch(batch.input_ids[:, :length], batch.attention_mask, batch.group))
    return [*shortened, *(batch for batch in batches if batch.group != HELD_OUT_GROUP)]


def run_parted(site: Site, streams: OffloadedTensors) -> None:
    """Let the held-out streams, which come first, pass a site's sublayers."""
    for number, batch in enumerate(site.activations[: len(streams)]):
        streams[number] = site.pass_on(batch, streams[number])
