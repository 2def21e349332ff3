"""What a training reads and where it writes never touch each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from eigenslice.errors import CheckpointError, EigensliceError, IncompleteError, OutputError
from eigenslice.finetune import FinetuneOptions, finetune
from eigenslice.finetune.inputs import open_input, open_sliced
from eigenslice.runtime.output import partial_path
from tests.attacks.disk import snapshot
from tests.checkpoint.files import copy_of, edit_json
from tests.conftest import Folders, Slicer
from tests.finetune.conftest import Training, Tuner
from tests.messages import check_message
from tests.results import load


def refused(options: FinetuneOptions, world: Path, kind: type[EigensliceError] = OutputError) -> EigensliceError:
    """What is said, and nothing on the disk has changed."""
    before = snapshot(world)
    with pytest.raises(kind) as caught:
        finetune(options)
    assert snapshot(world) == before
    return caught.value


@pytest.mark.parametrize("where", ["model/small", "m", "link/small", "around"])
@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_touches_an_input_is_refused(
    where: str, role: str, resume: bool, training: Training, dense_folder: Folders, tmp_path: Path
) -> None:
    """In it, around it, or with it in the work folder; before anything is read: the weights are broken."""
    source = Path(training.options.model) if role == "model" else dense_folder("llama")
    inside = {"m": "m.partial", "around": "around.partial/deep/model"}.get(where, "model")
    folder = copy_of(source, tmp_path / inside)
    (folder / "model.safetensors").write_text("broken")
    (tmp_path / "link").symlink_to(folder)
    options = training.at(tmp_path / where, resume=resume, **{role: str(folder)})
    check_message(refused(options, tmp_path), "are in one another")


@pytest.mark.parametrize("resume", [False, True])
def test_a_work_folder_of_somebody_else_is_left_alone(resume: bool, training: Training, tmp_path: Path) -> None:
    partial_path(tmp_path / "out").mkdir()
    (partial_path(tmp_path / "out") / "notes.txt").write_text("mine")
    check_message(refused(training.at(tmp_path / "out", resume=resume), tmp_path), "notes.txt")


@pytest.mark.parametrize("where", ["notes.txt", "state/notes.txt", "result/notes.txt", "companions/notes.txt"])
def test_what_somebody_put_into_the_work_folder_is_left_alone(where: str, training: Training, tmp_path: Path) -> None:
    training.interrupt(tmp_path / "out")
    path = partial_path(tmp_path / "out") / where
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    check_message(refused(training.at(tmp_path / "out"), tmp_path), where)


@pytest.mark.parametrize("resume", [False, True])
def test_the_lock_is_tried_before_anything_else(resume: bool, training: Training, tmp_path: Path) -> None:
    training.interrupt(tmp_path / "out")
    state = partial_path(tmp_path / "out") / "state"
    with FileLock(state.parent / "lock"):
        before = snapshot(state)
        with pytest.raises(OutputError) as caught:
            finetune(training.at(tmp_path / "out", resume=resume, model=str(tmp_path / "none")))
        check_message(caught.value, "another process is writing")
        assert snapshot(state) == before


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_logs_of_somebody_else_are_left_alone(
    name: str, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eigenslice.options.finetuning.find_spec", lambda name: True)
    (tmp_path / "out.logs").mkdir()
    (tmp_path / "out.logs" / name).write_text("mine")
    options = training.at(tmp_path / "out", log_to=("tensorboard",))
    check_message(refused(options, tmp_path), "out.logs", name)
    model = copy_of(Path(training.options.model), tmp_path / "other.logs")
    options = training.at(tmp_path / "other", log_to=("tensorboard",), model=str(model))
    check_message(refused(options, tmp_path), "other.logs")


def test_logs_go_on_where_they_were(tmp_path: Path, training: Training) -> None:
    from eigenslice.finetune.training import check_logs

    options = training.at(tmp_path / "out", log_to=("tensorboard",))
    check_logs(options, [])
    (tmp_path / "out.logs").mkdir()
    (tmp_path / "out.logs" / "events.out.tfevents.1.host.2.0").touch()
    check_logs(options, [])
    shutil.rmtree(tmp_path / "out.logs")
    (tmp_path / "out.logs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        check_logs(options, [])


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"dtype": "float32"}'], ids=lambda c: c[:4])
def test_a_broken_manifest_is_refused_before_the_training(content: str, training: Training, tmp_path: Path) -> None:
    model = copy_of(Path(training.options.model), tmp_path / "model")
    (model / "eigenslice.json").write_text(content)
    options = training.at(tmp_path / "out", model=str(model))
    check_message(refused(options, tmp_path, CheckpointError), "eigenslice.json")


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "generation_config.json", "special_tokens_map.json"])
def test_a_link_out_of_the_model_is_refused(name: str, training: Training, tmp_path: Path) -> None:
    model = copy_of(Path(training.options.model), tmp_path / "model")
    secret = tmp_path / "secret.txt"
    secret.write_text((model / name).read_text() if (model / name).exists() else "{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    options = training.at(tmp_path / "out", model=str(model))
    check_message(refused(options, tmp_path, CheckpointError), name)


def test_what_changes_in_the_input_meanwhile_changes_nothing(training: Training, tmp_path: Path) -> None:
    """The config is edited, the weights are written over in place, and a licence comes."""
    model = copy_of(Path(training.options.model), tmp_path / "model")
    output = tmp_path / "out"

    def disturb(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 1):
            edit_json(model / "config.json", model_type="gpt2")
            (model / "LICENSE").write_text("new")
            weights = model / "model.safetensors"
            with weights.open("r+b") as file:
                file.seek(weights.stat().st_size // 2)
                file.write(b"\x7f" * (weights.stat().st_size // 2))

    found = finetune(training.at(output, model=str(model), resume=False), disturb)
    training.check(output)
    assert found.manifest["finetune"]["base"]["sha256"] == open_sliced(training.options.model).hashes


def test_weights_that_change_while_they_are_read_are_refused(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(Path(training.options.model), tmp_path / "model")
    found = open_input(str(model))
    stamp = found.stamp
    found.refuse_changed(stamp)
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        found.refuse_changed(stamp)
    check_message(caught.value, "changed while it was read")
    sliced = open_sliced(str(model))
    assert sliced.hashes
    tensors = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "copy").mkdir()
    with pytest.raises(IncompleteError) as lost:
        sliced.copy_weights(tmp_path / "copy")
    check_message(lost.value, "changed while it was read")


def test_each_tensor_keeps_the_dtype_that_it_is_stored_in(run_slice: Slicer, tune: Tuner, tmp_path: Path) -> None:
    sliced = copy_of(run_slice("llama", width=24).output, tmp_path / "mixed")
    tensors = load_file(sliced / "model.safetensors")
    tensors = {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in tensors.items()}
    save_file(tensors, sliced / "model.safetensors", metadata={"format": "pt"})
    edit_json(sliced / "eigenslice.json", dtype="bfloat16")
    for options in ({}, {"full": True}, {"keep_adapter": True, "shard_gib": 1e-5}):
        tuned = tune(sliced, epochs=0.2, **options).output
        assert {n: t.dtype for n, t in load_file(tuned / "model.safetensors").items()} == {
            name: tensor.dtype for name, tensor in tensors.items()
        }


def test_a_sharded_model_with_all_its_companions(training: Training, tmp_path: Path) -> None:
    """Merged and beside an adapter; nothing else of the folder, such as an export, joins the result."""
    model = copy_of(Path(training.options.model), tmp_path / "model")
    load(model).save_pretrained(model, max_shard_size="5KB")
    (model / "model.safetensors").unlink()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (model / "LICENSE").write_text("mine")
    (model / "old.gguf").write_text("of the model before")
    expected = {path.name for path in model.iterdir()} - {"old.gguf"}
    assert any("-of-" in name for name in expected)
    for keep, added in ((False, set()), (True, {"adapter_config.json", "adapter_model.safetensors"})):
        options: dict[str, Any] = {"model": str(model), "keep_adapter": keep, "epochs": 0.5, "shard_gib": 5e-6}
        output = finetune(training.at(tmp_path / f"out-{keep}", resume=False, **options)).output
        found = {path.name for path in output.iterdir()}
        weights = {name for name in found | expected if "-of-" in name}
        assert found - weights - {"README.md"} == expected - weights - {"README.md"} | added
        assert (output / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
        manifest = json.loads((output / "eigenslice.json").read_bytes())
        assert manifest["sha256"].keys() == {n for n in found if n.endswith(".safetensors")}
    with pytest.raises(CheckpointError, match="holds an adapter beside its weights"):
        open_sliced(str(tmp_path / "out-True"))


@pytest.mark.filterwarnings("ignore:Training didn't help")
def test_a_disk_without_room_for_the_checkpoints_is_seen_before_the_training(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"full": [], "adapters": []}
    for kind, found in sizes.items():
        monkeypatch.setattr("eigenslice.finetune.recovery.check_space", lambda _, needed, f=found: f.append(needed))
        finetune(training.at(tmp_path / kind, resume=False, full=kind == "full", epochs=0.2))
    numbers = sum(tensor.numel() for tensor in load_file(training.options.model + "/model.safetensors").values())
    assert sizes["full"] == [10 * 4 * numbers]
    assert sizes["adapters"][0] < 8 * 4 * numbers


def test_a_generation_config_that_only_loads_is_kept(training: Training, tmp_path: Path) -> None:
    """transformers refuses to save it: at the end of a training, all work would be lost."""
    model = copy_of(Path(training.options.model), tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    output = finetune(training.at(tmp_path / "out", model=str(model), resume=False, full=True)).output
    assert (output / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()


def test_a_model_that_can_not_be_saved_is_refused_before_the_training(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("not in this form")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", refuse)
    check_message(refused(training.at(tmp_path / "out"), tmp_path, CheckpointError), "not in this form")
    monkeypatch.undo()
    monkeypatch.setattr(
        "eigenslice.finetune.inputs.as_stored", lambda model, own: {f"x.{n}": t for n, t in own.items()}
    )
    check_message(refused(training.at(tmp_path / "out"), tmp_path, CheckpointError), "in another form")
