"""The trained model and the teacher, read before the training and never again."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from eigenslice.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from eigenslice.checkpoint.companions import copy_companions
from eigenslice.checkpoint.files import LARGEST_JSON, check_file
from eigenslice.checkpoint.loading import LoadedModel, count_numbers, load_model
from eigenslice.checkpoint.mapping import as_stored
from eigenslice.checkpoint.names import CONFIG
from eigenslice.checkpoint.source import locate
from eigenslice.checkpoint.weights import INDEX, SafetensorsWeights
from eigenslice.errors import CheckpointError, IncompleteError, OptionsError, first_line
from eigenslice.modeling import SlicedConfig
from eigenslice.options.common import DtypeName
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.report.card import CARD, read_card_metadata
from eigenslice.report.manifest import NAME, read_manifest
from eigenslice.runtime.durable import file_hashes
from eigenslice.vocabulary import keep_rows, kept_ids

Stored = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shape and dtype of tensors, by their names in the files."""


@dataclass(frozen=True)
class Input:
    """A checkpoint that is read.

    Attributes:
        name: The name that the user wrote.
        folder: The folder of the files.
        gguf: Name of the GGUF file in `folder`; None for a folder of safetensors.
    """

    name: str
    folder: Path
    gguf: str | None

    @property
    def path(self) -> Path:
        """The file or folder that holds the checkpoint."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def files(self) -> list[Path]:
        """The files that the model's output depends on."""
        if self.gguf:
            return [self.folder / self.gguf]
        beside = [self.folder / name for name in (CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return [*SafetensorsWeights(self.folder).files, *(path for path in beside if path.exists())]

    @property
    def stamp(self) -> list[tuple[str, int, int, int]]:
        """Return a value that changes when one of the files is written to."""
        stats = ((file, file.stat()) for file in self.files)
        return [(file.name, status.st_size, status.st_mtime_ns, status.st_ino) for file, status in stats]

    @cached_property
    def numbers(self) -> int:
        """How many numbers the weights have."""
        return count_numbers(self.folder, self.gguf)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files, by name."""
        return file_hashes(self.files)

    def load(self, dtype: DtypeName | None, trust_remote_code: bool) -> LoadedModel:
        """The model on the CPU, in memory of its own: later changes of the files don't reach it."""
        loaded = load_model(self.name, "cpu", dtype, trust_remote_code)
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
            tensor.data = tensor.data.clone()
        return loaded

    def refuse_changed(self, stamp: list[tuple[str, int, int, int]]) -> None:
        """Refuse files that were written to since this stamp was taken.

        Raises:
            CheckpointError.
        """
        if self.stamp != stamp:
            raise CheckpointError(
                f"{self.name} changed while it was read",
                allowed="a checkpoint that nobody writes to",
                next_step="wait until it is written, then run the command again",
            )


@dataclass(frozen=True)
class Sliced(Input):
    """A sliced model.

    Attributes:
        manifest: The model's manifest.
        stored: The model's tensors.
    """

    manifest: dict[str, Any]
    stored: Stored

    def stage(self, folder: Path, trust_remote_code: bool) -> dict[str, Any]:
        """Copy the files that the result takes over beside the weights, and return the metadata of the model's card.

        Raises:
            CheckpointError: a file is broken, or is a link that leads out of the model's folder.
        """
        copy_companions(self.name, self.folder, folder, trust_remote_code, result=True)
        check_file(self.folder / CONFIG, self.folder, LARGEST_JSON)
        shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
        return read_card_metadata(self.folder / CARD)

    def copy_weights(self, folder: Path) -> None:
        """Copy the weight files, and their index.

        Raises:
            IncompleteError: the files have changed since they were read.
        """
        files = SafetensorsWeights(self.folder).files
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if len(files) > 1:
            shutil.copyfile(self.folder / INDEX, folder / INDEX)
        if any(self.hashes[name] != digest for name, digest in file_hashes(folder / f.name for f in files).items()):
            raise IncompleteError(
                f"{self.name} changed while it was read",
                allowed="a checkpoint that nobody writes to",
                next_step="wait until it is written, then run the command again",
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that one of the model's tensors is stored in."""
        dtype = self.stored.get(name, ((), None))[1]
        return dtype or getattr(torch, self.manifest["dtype"])

    def check_saving(self, model: Any) -> None:
        """Refuse a model that transformers can't save, or not as it is stored.

        Everything but the weights is saved on trial; names of weights are computed. The generation config isn't saved,
        because transformers loads some configs that it doesn't save.

        Raises:
            CheckpointError: the model can't be saved.
        """
        model.generation_config = GenerationConfig()
        try:
            with TemporaryDirectory(prefix="eigenslice-") as folder:
                model.save_pretrained(folder, state_dict={})
            own = {name: p.to("meta") for name, p in model.named_parameters()}
            names = own if model.config.model_type == SlicedConfig.model_type else as_stored(model, own)
        except (OSError, SafetensorError):  # the disk
            raise
        except Exception as error:  # whatever configs raise
            raise self._not_saved(f"can't be saved again by transformers ({first_line(error)})") from error
        wrong = sorted(n for n, tensor in names.items() if self.stored.get(n, ((),))[0] != tuple(tensor.shape))
        if wrong:
            raise self._not_saved(f"stores {wrong[0]} in another form than transformers saves")

    def _not_saved(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} {why}",
            allowed="a model whose names, shapes and config save_pretrained writes",
            next_step="load the model with transformers and save it with save_pretrained, or report this model",
        )


def open_input(name: str) -> Input:
    """Find a checkpoint, dense or sliced, maybe with an adapter.

    Raises:
        CheckpointError: there is none.
    """
    return Input(name, *locate(name, adapters=True))


def open_sliced(name: str) -> Sliced:
    """Find a sliced model.

    Raises:
        CheckpointError: it is none, its manifest is broken, or it has an adapter of its own.
    """
    folder, gguf = locate(name)
    manifest = None if gguf else read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{name} is no sliced model: it has no {NAME}",
            allowed="a folder that eigenslice slice or eigenslice finetune wrote",
            next_step="slice the model first",
        )
    return Sliced(name, folder, gguf, manifest, stored_tensors(folder))


def stored_tensors(folder: Path) -> Stored:
    """The tensors in a folder's weight files."""
    weights = SafetensorsWeights(folder)
    return {name: (weights.shape(name), weights.dtype(name)) for name in weights.names()}


def fit_teacher(options: FinetuneOptions, manifest: dict[str, Any], loaded: LoadedModel, teacher: LoadedModel) -> None:
    """Leave only the kept tokens to a teacher of a model whose vocabulary was cut; refuse other vocabularies."""
    ours, theirs = (m.model.config.get_text_config().vocab_size for m in (loaded, teacher))
    if ours == theirs:
        return
    kept = kept_ids(teacher.tokenizer(), loaded.tokenizer()) if "vocabulary" in manifest else None
    if kept is None or kept[-1] >= theirs:
        raise OptionsError(
            f"--teacher {options.teacher} has a vocabulary of {theirs} tokens, {options.model} of {ours}",
            allowed="the dense model that was sliced, or one with the same tokenizer",
            next_step="pass the dense model",
        )
    keep_rows(teacher.model, kept)
