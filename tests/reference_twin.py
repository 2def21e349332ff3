"""Refitting in a few lines on transformers' own model, in float64: an independent reference of `SlicedTwin`.

The sliced model is a copy of the dense one that keeps the dense width: a hook projects what the embeddings give onto
the span of the basis Q, writers get weights that stay in it, and hooks behind the norms give the readers what the
reading matrix makes of the stream. So no weight is folded, rotated or narrowed. Each fit is one least-squares problem
over the tokens themselves, with rows for the ridge.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.refit import RIDGES
from eigenslice.arch import lookup
from tests.reference import moment, rms_norm
from tests.reference_normed_writers import fit_normed_writer
from tests.reference_readers import fit_readers

FADING = 0.8


@dataclass(frozen=True)
class Twin:
    """What is fitted, and how.

    Attributes:
        width: That is kept.
        neurons: That are kept, in each block; None keeps all.
        constant: Whether the last kept direction is the constant vector (LayerNorms, tied or stock).
        tied: Whether the head is tied: then it isn't fitted, and sees the final gain only inside of the basis.
        head_weight: Of the last site in the basis.
        ridge: Of every fit; None chooses it as `RidgeChoice` does.
        parts: With `ridge` None, the number of equal parts of the calibration sequences that take turns.
        dropped: Numbers of the blocks that are left out.
        stride: Of so many tokens, one is reckoned with in the curvature of what neurons read.
        rotated: Whether the basis is of principal components; if not, it is the dense model's own coordinates.
    """

    width: int
    neurons: int | None = None
    constant: bool = False
    tied: bool = False
    head_weight: float = 1.0
    ridge: float | None = None
    parts: int = 4
    dropped: tuple[int, ...] = ()
    stride: int = 1
    rotated: bool = True

    def logits(self, model: Any, calibration: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits on ids of the model that was fitted on the calibration tokens; their mask is 0 for padding."""
        with torch.no_grad():
            return Fit(self, model, calibration, mask).run()(ids).logits


class Fit:
    """The state of one fit."""

    def __init__(self, twin: Twin, model: Any, calibration: Tensor, mask: Tensor | None) -> None:
        self.twin, self.calibration, self.mask = twin, calibration, mask
        self.real = torch.ones_like(calibration).bool() if mask is None else mask.bool()
        table, config = lookup(model.config), model.config
        self.eps, self.centred = table.epsilon(config), table.norm == "layer"
        self.unit = 1.0 if table.gain == "1+w" else 0.0  # what is added to a norm's weight
        at_site = table.sites(config)
        blocks = [f"{table.layers}.{i}." for i in range(config.num_hidden_layers)]
        self.norms = [f"{block}{site[0].norm or site[0].modules[0]}" for block in blocks for site in at_site]
        self.all_norms = [{f"{block}{s.norm or s.modules[0]}" for s in site} for block in blocks for site in at_site]
        self.norms, self.all_norms = [*self.norms, table.final_norm], [*self.all_norms, {table.final_norm}]
        self.normed = [bool(site[0].norm) for _ in blocks for site in at_site] + [True]
        self.writers = [[block + s.neuron_writer for s in site] for block in blocks for site in at_site]
        posts = [block + (site[0].post_norm or "") for block in blocks for site in at_site]
        self.posts = {k: name for k, name in enumerate(posts) if not name.endswith(".")}
        layers = [model.get_submodule(block.rstrip(".")) for block in blocks for _ in at_site]
        last = [site is at_site[-1] for _ in blocks for site in at_site]
        self.scales = [  # of the stream behind the sublayers
            float(getattr(layer, table.stream_scale)) if table.stream_scale and at_end else 1.0
            for layer, at_end in zip(layers, last, strict=True)
        ]
        self.kinds = ["neurons" if table.mlp in site else "write" for _ in blocks for site in at_site]
        self.mlps = {k: self.writers[k][-1] for k, kind in enumerate(self.kinds) if kind == "neurons"}
        self.readers = {
            k: {blocks[k // len(at_site)] + name: 2 if name in table.mlp.gated else 1 for name in table.mlp.readers}
            for k in self.mlps
        }
        self.first, self.head = blocks[0].rstrip("."), table.lm_head
        self.gone = {k for k in range(len(self.writers)) if k // len(at_site) in twin.dropped}

        seen = self.inputs(model, [*self.norms, *self.mlps.values(), *self.posts.values()])
        self.dense = [self.centre(seen[norm]) for norm in self.norms]
        self.unnormed = {k: seen[name] for k, name in self.posts.items()}
        self.gains = {k: (model.get_submodule(name).weight + self.unit).detach() for k, name in self.posts.items()}
        self.kept = {name: self.most(model, k, seen[name]) for k, name in self.mlps.items()}
        self.basis = self.find_basis()
        self.c = (twin.width / self.basis.shape[0]) ** 0.5
        self.sliced = copy.deepcopy(model)
        self.readings: list[Tensor | None] = [None] * len(self.norms)
        self.seen: dict[int, Tensor] = {}  # what the norms of a site make of the stream in the basis
        self.errors: dict[str, dict[float, float]] = {}

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inputs(self, model: Any, names: list[str]) -> dict[str, Tensor]:
        """What some modules are given when the calibration tokens run, (tokens that count, n)."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Any, tuple[Tensor, ...], dict[str, Any]], None]:
            def hook(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                seen[name] = x.reshape(*self.real.shape, -1)[self.real].double()

            return hook

        hooks = [
            model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True, prepend=True)
            for name in names
        ]
        model(self.calibration, attention_mask=self.mask)
        for hook in hooks:
            hook.remove()
        return seen

    def norm_at(self, site: int, x: Tensor) -> Tensor:
        """What the sublayers at a site see of the stream."""
        return rms_norm(x, self.eps) if self.normed[site] else x

    def inverse_size(self, x: Tensor) -> Tensor:
        """The factor that a norm divides by, (tokens, 1)."""
        return (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def most(self, model: Any, site: int, a: Tensor) -> Tensor:
        """Indices of the neurons that add most energy to the stream, as a share of the stream's."""
        weight = model.get_submodule(self.mlps[site]).weight
        size = self.inverse_size(self.dense[site])
        if site in self.posts:
            weight, size = self.gains[site][:, None] * weight, size * self.inverse_size(self.unnormed[site])
        energy = (a * size).square().sum(0) * self.centre(weight.T).square().sum(1)
        return energy.argsort(descending=True)[: self.twin.neurons]

    def find_basis(self) -> Tensor:
        if not self.twin.rotated:
            return torch.eye(self.twin.width, dtype=torch.float64)
        moments = [moment(rms_norm(x, self.eps)) for x in self.dense]
        moments[-1] = self.twin.head_weight * moments[-1]
        vectors = torch.linalg.eigh(torch.stack(moments).sum(0)).eigenvectors
        basis = vectors[:, len(vectors) - self.twin.width + self.twin.constant :]
        constant = torch.full((len(vectors), 1), len(vectors) ** -0.5, dtype=torch.float64)
        return torch.cat([basis, constant], dim=1) if self.twin.constant else basis

    def solve(self, kind: str, site: int, a: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The W that minimizes |Y - A W^T|^2 + r |W - base|^2."""

        def ridge_regression(share: float, rows: Tensor) -> Tensor:
            level = share * a[rows].square().sum() / a.shape[1]
            ridge_rows = level.sqrt() * torch.eye(a.shape[1], dtype=torch.float64)
            stacked = torch.cat([a[rows], ridge_rows]), torch.cat([y[rows], level.sqrt() * base.T])
            return torch.linalg.lstsq(*stacked).solution.T

        everything = torch.ones(len(a), dtype=torch.bool)
        if self.twin.ridge is not None:
            return ridge_regression(self.twin.ridge, everything)
        parts, sequences = self.twin.parts, len(self.calibration)
        part = (torch.arange(sequences) * parts // sequences)[:, None].expand_as(self.real)[self.real]
        held = part == site % parts
        # Errors below 1e-5 of the energy count as rounding
        before = torch.maximum((y[held] - a[held] @ base.T).square().sum(), 1e-5 * y[held].square().sum())
        errors = self.errors.setdefault(kind, dict.fromkeys(RIDGES, 0.0))
        for share in RIDGES:
            error = (y[held] - a[held] @ ridge_regression(share, ~held).T).square().sum()
            errors[share] = FADING * errors[share] + float(error / before)
        return ridge_regression(min(errors, key=lambda share: errors[share]), everything)

    def run(self) -> Any:
        """Fit site after site; gives the sliced model."""
        P = self.basis @ self.basis.T
        layer = self.sliced.get_submodule(self.first)
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: ((self.centre(args[0]) @ P.to(args[0].dtype), *args[1:]), kwargs), with_kwargs=True
        )
        for site, names in enumerate(self.all_norms):
            for module in map(self.sliced.get_submodule, names):
                if self.normed[site]:
                    module.register_forward_hook(self.reader_hook(site))
                else:
                    module.register_forward_pre_hook(self.plain_reader_hook(site), with_kwargs=True)
        for module in (self.sliced.get_submodule(name) for site in self.gone for name in self.writers[site]):
            for parameter in module.parameters():  # the stream passes the block as it is
                parameter.zero_()
        stream, before = None, 0
        for site, name in enumerate(self.norms):
            if site in self.gone:
                continue
            if stream is not None:
                self.fit_writers(before, site, stream)
            stream, before = self.inputs(self.sliced, [name])[name], site
            if self.twin.tied and site == len(self.norms) - 1:
                break
            z = self.norm_at(site, self.c * stream @ self.basis)
            base = self.basis / self.c
            reading = self.solve("read", site, z, self.norm_at(site, self.dense[site]), base)
            self.readings[site] = reading @ (self.c * self.basis.T)
        return self.sliced

    def reader_hook(self, site: int) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        """Puts the reading matrix between a norm's division and its gain."""
        tied_head = self.twin.tied and site == len(self.norms) - 1

        def hook(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.seen[site] = rms_norm(self.c * self.centre(args[0]) @ self.basis.to(args[0].dtype), self.eps)
            gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
            gain = None if gain is None else gain + self.unit
            plain = output if shift is None else output - shift
            plain = plain if gain is None else plain / gain
            reading = self.readings[site]
            plain = plain if reading is None else plain @ reading.T
            plain = plain if gain is None else plain * gain
            plain = plain @ self.basis @ self.basis.T if tied_head else plain
            return plain if shift is None else plain + shift

        return hook

    def plain_reader_hook(self, site: int) -> Callable[[Any, tuple[Tensor, ...], dict[str, Any]], Any]:
        """Puts the reading matrix before a module that reads the stream as it is."""

        def hook(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            x = args[0] if args else kwargs["hidden_states"]
            self.seen[site], reading = self.c * x @ self.basis.to(x), self.readings[site]
            x = x if reading is None else x @ reading.T.to(x)
            return ((x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": x})

        return hook

    def fit_writers(self, before: int, site: int, stream: Tensor) -> None:
        """Fit what is written between the site before, where the stream was `stream`, and this one."""
        if before in self.posts:
            fit_normed_writer(self, before, site, stream)
            return
        names, Q, x = self.writers[before], self.basis, self.dense[site]
        modules = [self.sliced.get_submodule(name) for name in names]
        seen = self.inputs(self.sliced, names)
        columns = [self.kept.get(name, torch.arange(seen[name].shape[1])) for name in names]
        a = [seen[name][:, some] for name, some in zip(names, columns, strict=True)]
        parts = [self.c * Q.T @ self.centre(m.weight.T).T[:, some] for m, some in zip(modules, columns, strict=True)]
        biased = [module for module in modules if module.bias is not None]
        if biased:
            a.append(torch.ones(len(x), 1, dtype=torch.float64))
            parts.append(self.c * Q.T @ self.centre(torch.stack([module.bias for module in biased]).sum(0))[:, None])
        share = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        y = self.c * (x - stream) @ Q
        fitted = self.solve(self.kinds[before], site, share * torch.cat(a, dim=1), share * y, torch.cat(parts, dim=1))
        pieces = (Q @ fitted / self.c).split([part.shape[1] for part in parts], dim=1)
        for module, piece, some in zip(modules, pieces, columns, strict=False):
            module.weight.zero_()
            module.weight[:, some] = piece
        for number, module in enumerate(biased):
            module.bias.copy_(pieces[-1][:, 0] if number == 0 else torch.zeros_like(module.bias))
        if before in self.mlps:
            missing = share * (y - torch.cat(a, dim=1) @ fitted.T)
            columns = fitted.split([part.shape[1] for part in parts], dim=1)[names.index(self.mlps[before])]
            fit_readers(self, before, missing, share, rms_norm(self.c * stream @ Q, self.eps), columns)
