"""The loop that runs sliced models beside the dense one: order of steps, streams, saved positions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.checkpoint.source import open_source
from eigenslice.cut.blocks import ALL, SiteBasis
from eigenslice.cut.ends import GlobalBasis, GlobalCut
from eigenslice.data.batches import Batch
from eigenslice.fit.beside import run_beside
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.model.dense import DenseModel, Tensors
from eigenslice.plan.plan import Plan, widths
from eigenslice.runtime import run_state
from eigenslice.stream.run import Run
from eigenslice.stream.walk import STREAMS, Site
from tests import tiny
from tests.conftest import Folders
from tests.results import load
from tests.runs import run_of

BLOCKS = 3
WIDTH = 20
FAMILIES = ["llama-biased", "opt-untied", "gpt_neox", "gpt_neox-sequential"]


@pytest.fixture
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save at every block, however long that takes."""
    monkeypatch.setattr(run_state, "SHARE", 1.0)


def batches() -> list[Batch]:
    """Return sequences of two groups; one of them is padded."""
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[0, :7] = 0
    return [Batch(tiny.random_ids(4, 24, seed=1), mask, 0), Batch(tiny.random_ids(5, 24, seed=2), None, 1)]


class Recorder:
    """A twin that computes nothing and records its calls."""

    def __init__(self, name: str, events: list[tuple[str, ...]], dropped: tuple[int, ...] = ()) -> None:
        self._name, self._events, self._dropped = name, events, dropped

    def is_dropped_at(self, site: Site) -> bool:
        return site.block in self._dropped

    def fit_writers_before(self, site: Site) -> None:
        self.streams = site.streams
        self._events.append((f"{self._name} writers", f"{site.block}.{site.index}"))

    def fit_readers_at(self, site: Site) -> None:
        self._events.append((f"{self._name} readers", f"{site.block}.{site.index}"))

    def content(self) -> dict[str, Any]:
        return {"of": self._name}


def begun(dense: DenseModel, folder: Path, stage: str = "fit") -> tuple[Run, Any]:
    """Return a run, and the options of a loop from the beginning."""
    run = run_of(dense, batches(), folder)
    return run, {"stage": stage, "position": None, "report": lambda block: None}


@pytest.mark.parametrize(("case", "sites"), [("llama", 2), ("gpt_neox", 1)])
def test_each_site_is_seen_between_writers_and_readers(
    case: str, sites: int, dense_folder: Folders, tmp_path: Path
) -> None:
    run, options = begun(DenseModel(open_source(str(dense_folder(case)))), tmp_path)
    events: list[tuple[str, ...]] = []
    options["report"] = lambda block: events.append(("report", str(block)))
    twins: Any = {name: Recorder(name, events) for name in ("a", "b")}
    for site in run_beside(run, run.tokens.batches, twins, **options):
        events.append(("seen", f"{site.block}.{site.index}"))
    expected: list[tuple[str, ...]] = []
    places = [(block, index) for block in range(BLOCKS) for index in range(sites)] + [(BLOCKS, 0)]
    for block, index in places:
        at = f"{block}.{index}"
        expected += [("report", str(block)), ("a writers", at), ("b writers", at), ("seen", at)]
        expected += [("a readers", at), ("b readers", at)]
    assert events == expected


def saved_blocks(run: Run, twins: Any, options: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], Path]]:
    """Run the loop; yield the block, the content and the folder of each new position, while the position is there."""
    last = None
    for _ in run_beside(run, run.tokens.batches, twins, **options):
        position = run.state.position(options["stage"])
        if position and position.block != last:
            last = position.block
            yield position.block, position.content, position.folder


@pytest.mark.usefixtures("always_saved")
def test_positions_hold_the_dense_stream_and_the_content(dense_folder: Folders, tmp_path: Path) -> None:
    """The saved streams are transformers' hidden states before the block."""
    folder = dense_folder("llama")
    run, options = begun(DenseModel(open_source(str(folder))), tmp_path)
    options["content"] = lambda: {"extra": 7}
    with torch.no_grad():
        states = [
            load(folder)(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
            for batch in run.tokens.batches
        ]
    twins: Any = {"small": Recorder("small", [])}
    seen = []
    for block, content, place in saved_blocks(run, twins, options):
        seen.append(block)
        assert content == {"fits": {"small": {"of": "small"}}, "extra": 7}
        streams = load_file(place / STREAMS / "memory")
        assert len(streams) == len(states)
        for stream, batch, expected in zip(streams.values(), run.tokens.batches, states, strict=True):
            counts = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            torch.testing.assert_close(stream[counts > 0], expected[block][counts > 0], rtol=1e-4, atol=1e-4)
    assert seen == [1, 2]  # the position before the head is saved behind the last site that is seen here


@pytest.mark.usefixtures("always_saved")
def test_no_position_is_saved_before_a_block_that_a_twin_is_without(dense_folder: Folders, tmp_path: Path) -> None:
    run, options = begun(DenseModel(open_source(str(dense_folder("llama")))), tmp_path)
    twins: Any = {"whole": Recorder("whole", []), "gap": Recorder("gap", [], dropped=(1,))}
    assert [block for block, _, _ in saved_blocks(run, twins, options)] == [2]


class Fitted:
    """A twin with all neurons, and the blocks that it wrote."""

    def __init__(self, run: Run, width: int) -> None:
        dense = run.dense
        generator = torch.Generator().manual_seed(0)
        matrix = torch.linalg.qr(torch.randn(dense.anatomy.width, width, generator=generator, dtype=torch.float64))[0]
        counts = (dense.anatomy.neuron_count,) * dense.anatomy.block_count
        plan = Plan("global", widths(dense.anatomy, "global", width), False, None, counts)
        self.basis = SiteBasis(matrix)
        cut = GlobalCut(plan, GlobalBasis(self.basis, None), [ALL] * dense.anatomy.block_count)
        self.blocks: dict[int, Tensors] = {}
        self.twin = SlicedTwin(run, cut, Fitting({0, 1}, ridge=1e-6), self.blocks.__setitem__)


@pytest.mark.parametrize("case", FAMILIES)
def test_with_nothing_cut_the_sliced_stream_is_the_dense_one_in_the_basis(
    case: str, dense_folder: Folders, tmp_path: Path
) -> None:
    """At each block, against hidden states of transformers; behind the last block they are normalized there."""
    folder = dense_folder(case)
    dense = DenseModel(open_source(str(folder)))
    run, options = begun(dense, tmp_path)
    fitted = Fitted(run, dense.anatomy.width)
    with torch.no_grad():
        states = [
            load(folder)(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
            for batch in run.tokens.batches
        ]
    compared = 0
    for site in run_beside(run, run.tokens.batches, {"twin": fitted.twin}, **options):
        if site.index or site.block == dense.anatomy.block_count:
            continue
        for batch, stream, expected in zip(run.tokens.batches, fitted.twin.streams, states, strict=True):
            counts = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            x = expected[site.block][counts > 0]
            x = x - x.mean(-1, keepdim=True) if dense.anatomy.layer_norm else x
            found = stream[counts > 0].double() @ fitted.basis.matrix.T
            assert (found - x).norm() < 1e-3 * x.norm()
            compared += 1
    assert compared == BLOCKS * 2


@pytest.mark.usefixtures("always_saved")
@pytest.mark.parametrize("case", FAMILIES)
def test_a_loop_goes_on_at_a_saved_position(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))

    def finish(run: Run, fitted: Fitted, options: dict[str, Any]) -> list[Site]:
        return list(run_beside(run, run.tokens.batches, {"twin": fitted.twin}, **options))

    run, options = begun(dense, tmp_path)
    whole = Fitted(run, WIDTH)
    finish(run, whole, options)

    run, options = begun(dense, tmp_path)
    stopped = Fitted(run, WIDTH)
    for site in run_beside(run, run.tokens.batches, {"twin": stopped.twin}, **options):
        if site.block == 2:
            break  # the position before block 1 is the last saved one
    position = run.state.position("fit")
    assert position is not None
    assert position.block == 1
    gone_on = Fitted(run, WIDTH)
    sites = finish(run, gone_on, options | {"position": position})
    assert [sites[0].block, sites[0].resumed] == [1, True]
    assert not any(site.resumed for site in sites[1:])
    assert set(gone_on.blocks) == {1, 2}
    for block, tensors in gone_on.blocks.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole.blocks[block][name])
    assert gone_on.twin.reading is not None
    assert whole.twin.reading is not None
    assert torch.equal(gone_on.twin.reading, whole.twin.reading)
