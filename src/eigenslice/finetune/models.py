"""The trained model and the teacher where they are trained: whole on each device, or shared among the processes."""

from dataclasses import dataclass, replace
from typing import Any

from eigenslice.checkpoint.loading import LoadedModel, load_config
from eigenslice.finetune.inputs import Input, Sliced, fit_teacher
from eigenslice.finetune.sharding import make_mesh, shard, without_weights
from eigenslice.finetune.trained_weights import Needs, with_weights_chosen
from eigenslice.finetune.training import computes_in_bfloat16, frozen, on_gpu_in_bfloat16, with_adapters
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.runtime.ranks import Ranks


@dataclass(frozen=True)
class Models:
    """The models of a training.

    Attributes:
        trained: The model, whole on the CPU, or shared, and then with adapters if these are trained.
        teacher: The dense model, whole on the CPU or shared; None without one.
        skeleton: The first process's copy of a shared model without its weights; None otherwise.
    """

    trained: LoadedModel
    teacher: LoadedModel | None
    skeleton: Any = None


def choose_weights(options: FinetuneOptions, base: Sliced, dense: Input | None, ranks: Ranks) -> FinetuneOptions:
    """Return the options with what is trained decided, by the sizes in the files."""
    config = load_config(base.name, options.trust_remote_code)
    frozen = 2 if on_gpu_in_bfloat16(options, ranks.device) else 4
    needs = Needs.of(options, base.numbers, dense.numbers if dense else 0, config, frozen)
    return with_weights_chosen(options, needs, ranks)


def load_models(options: FinetuneOptions, base: Sliced, dense: Input | None, ranks: Ranks) -> Models:
    """Read the models.

    Where they are shared or lie on the host, the processes of a machine read one after the other. So its memory holds
    one whole model at a time, and the parts.

    Args:
        options: The options of the command, with `full` and `place` decided.
        base: The sliced model.
        dense: The dense model, or None.
        ranks: The processes.

    Raises:
        CheckpointError: a model can't be loaded, or not be saved again.
        OptionsError: the dense model isn't the one that was sliced.
    """
    if options.place == "device":
        trained = _load_trained(options, base)
        return Models(trained, _load_teacher(options, base, dense, trained) if dense else None)
    mesh, done = make_mesh(ranks), list[Models]()

    def load() -> None:
        trained, skeleton = _load_trained(options, base), None
        model = trained.model
        if not options.full:
            model = with_adapters(model, options, on_gpu_in_bfloat16(options, ranks.device))
        if ranks.first:
            skeleton = without_weights(model)
        bfloat16, on_host = computes_in_bfloat16(options, ranks.device), options.place == "host"
        trained = replace(trained, model=shard(model, mesh, bfloat16=bfloat16, on_host=on_host))
        teacher = None
        if dense:
            teacher = _load_teacher(options, base, dense, trained)
            still = frozen(teacher.model, options, ranks.device)
            teacher = replace(teacher, model=shard(still, mesh, on_host=on_host))
        done.append(Models(trained, teacher, skeleton))

    ranks.in_turns(load)
    return done[0]


def _load_trained(options: FinetuneOptions, base: Sliced) -> LoadedModel:
    loaded = base.load("float32", options.trust_remote_code)
    base.check_saving(loaded.model)
    return loaded


def _load_teacher(options: FinetuneOptions, base: Sliced, dense: Input, trained: LoadedModel) -> LoadedModel:
    teacher = dense.load(None, options.trust_remote_code)
    fit_teacher(options, base.manifest, trained, teacher)
    return teacher
