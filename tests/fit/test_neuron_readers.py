"""What MLP neurons read: slopes against differences, and the step against least squares with all unknowns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import Batch
from eigenslice.fit import neuron_readers as neuronfit
from eigenslice.fit.neuron_readers import Errors, Readers, fit_readers
from eigenslice.model.dense import DenseModel
from eigenslice.stream.runner import captured_inputs
from eigenslice.stream.walk import Site, Stream
from tests import tiny
from tests.conftest import Folders
from tests.runs import run_of

IN_FLOAT64 = [case for case in tiny.WITH_NEURONS if case != "xglm"]  # its attention mask overflows
KINDS = ["llama", "opt", "phi3"]  # gate and up, one reader with a bias, gate and up in one


@pytest.fixture
def at_mlp(dense_folder: Folders) -> Any:
    """Gives, for a case, its dense model, the site before the second block's MLP, in float64, and the readers there."""

    def find(case: str) -> tuple[DenseModel, Site, Readers]:
        dense = DenseModel(open_source(str(dense_folder(case))))
        mlp, sites = dense.table.mlp, dense.anatomy.sites
        walk = Stream(dense, torch.float64).walk([Batch(tiny.random_ids(3, 12, seed=4))], hold=True)
        site = next(site for site in walk if site.block == 1 and mlp in sites[site.index])
        assert site.folded is not None
        names = tuple(name for name in mlp.readers if mlp.weight(name) in site.folded)
        return dense, site, Readers(site.layer, site.index, mlp, names)

    return find


def written_from(site: Site, readers: Readers, nudges: dict[str, Tensor]) -> Tensor:
    """What the writer reads, (B, T, neurons), with something added to what each reader gives."""
    handles = [
        site.layer.get_submodule(name).register_forward_hook(lambda _, args, output, nudge=nudge: output + nudge)
        for name, nudge in nudges.items()
    ]
    with torch.no_grad(), captured_inputs(site.layer, [readers.writer]) as inputs:
        site.update(site.activations[0], site.activations[0].hidden)
    for handle in handles:
        handle.remove()
    return inputs[readers.writer]


@pytest.mark.parametrize("case", IN_FLOAT64)
def test_slopes_are_those_of_the_model(case: str, at_mlp: Any) -> None:
    _, site, readers = at_mlp(case)
    a = site.activations[0]
    normalized = site.layer.normalize(site.index, a.hidden)
    read, slopes = readers.linearize(normalized, a.kwargs[site.block])
    torch.testing.assert_close(read, normalized)
    neurons = written_from(site, readers, {}).shape[-1]
    kinds = []
    for name in readers.names:
        for start in range(0, readers.rows(name), neurons):
            nudge = torch.zeros(readers.rows(name), dtype=torch.float64)
            nudge[start : start + neurons] = 1e-6
            higher, lower = (written_from(site, readers, {name: sign * nudge}) for sign in (1, -1))
            kinds.append((higher - lower) / 2e-6)
    torch.testing.assert_close(slopes, torch.cat(kinds, -1), rtol=1e-4, atol=1e-6)


def least_squares(slopes: Tensor, read: Tensor, missing: Tensor, writer: Tensor, weight: Tensor) -> Tensor:
    """The P (rows, width) with the least |missing - sum of s_r (P x)_r d_r|^2 + level |P|^2, all unknowns at once."""
    slopes, kinds = slopes * weight, slopes.shape[1] // writer.shape[1]
    columns = writer.repeat(1, kinds)
    design = torch.einsum("tr,or,tw->torw", slopes, columns, read).flatten(2).flatten(0, 1)
    curvature = (slopes.square().sum(0) * columns.square().sum(0)).mean()
    level = neuronfit.RIDGE * curvature * (weight * read).square().sum() / read.shape[1] / len(read)
    rows = torch.cat([design, level.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)])
    right = torch.cat([missing.flatten(), torch.zeros(design.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, right).solution.view(slopes.shape[1], read.shape[1])


@pytest.mark.parametrize("case", KINDS)
def test_with_enough_steps_it_is_least_squares(
    case: str, at_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronfit, "CONJUGATE_GRADIENTS", 400)
    dense, site, readers = at_mlp(case)
    a = site.activations[0]
    normalized = site.layer.normalize(site.index, a.hidden)
    read, slopes = (a.rows(x) for x in readers.linearize(normalized, a.kwargs[site.block]))
    generator = torch.Generator().manual_seed(0)
    missing = torch.randn(len(read), dense.anatomy.width, dtype=torch.float64, generator=generator)
    weight = torch.rand(len(read), 1, dtype=torch.float64, generator=generator) + 0.5
    writer = site.folded[readers.sublayer.weight(readers.writer)]
    batch = Errors(a, normalized, a.kwargs[site.block], missing, weight)
    found, squares = fit_readers(readers, [batch], writer, run_of(dense, [], tmp_path), 1)
    assert squares == pytest.approx(float(missing.square().sum()))
    assert list(found) == list(readers.names)
    expected = least_squares(slopes, read, missing, writer.double(), weight)
    torch.testing.assert_close(
        torch.cat(list(found.values())), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )
