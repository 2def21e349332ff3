"""The distance of a sliced model's residual stream from the dense one."""

import torch

from eigenslice.cut.blocks import SiteBasis
from eigenslice.data.batches import BESIDE_GROUP, HELD_OUT_GROUP
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.walk import Site


def stream_error(site: Site, basis: SiteBasis, streams: OffloadedTensors, ranks: Ranks) -> dict[str, float]:
    """Measure the distance of a sliced stream from the dense stream at a site.

    Args:
        site: The site, with the dense streams.
        basis: The basis of the sliced stream.
        streams: The sliced streams, one (B, T, width) a batch.
        ranks: The processes that share the sequences.

    Returns:
        `error`, the squared difference as a share of the dense stream's energy, with the cut part included.
        `energy_kept`, the share of the dense energy in the basis. Both are means over held-out tokens. If no tokens are
        held out, they are means over the texts' tokens that layers are fitted on.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64, device=basis.matrix.device)  # fitted on, held out
    for number, batch in enumerate(site.activations):
        if batch.group != BESIDE_GROUP:
            dense, kept = batch.rows(batch.hidden), batch.rows(basis.embed(batch.hidden)) / basis.scale
            wrong = (kept - batch.rows(streams[number]) / basis.scale).square().sum(-1)
            size = dense.square().sum(-1) + dense.shape[-1] * site.eps
            share = kept.square().sum(-1) / size
            totals = torch.stack([(wrong / size + 1 - share).sum(), share.sum(), share.new_tensor(len(share))])
            sums[int(batch.group == HELD_OUT_GROUP)] += totals
    fitted, held_out = ranks.sum(sums).tolist()
    wrong, share, count = held_out if held_out[-1] else fitted
    return {"error": wrong / count, "energy_kept": share / count}
