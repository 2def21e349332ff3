"""Several processes give the model that one gives."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from eigenslice.algebra import refit
from eigenslice.algebra.cholesky import factor_in_place, solve_in_place
from eigenslice.cli import main
from eigenslice.data.batches import Batch, share_batches
from eigenslice.errors import EchoedError, EigensliceWarning
from eigenslice.runtime.ranks import Ranks, join_ranks
from tests import processes, tiny, words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders
from tests.fake_device import fake_device
from tests.results import load, relative

KINDS = {
    "planned": ("llama-tied", ["--keep", "0.3"]),
    "fitted": ("gpt_neox", ["--width", "24", "--neurons", "48"]),
    "per-block": ("opt", ["--width", "24", "--basis", "per-block"]),
}


def test_gpus_that_have_nothing_to_do_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.warns(EigensliceWarning, match="One of 2 GPUs works"), join_ranks(torch.device("cuda")) as ranks:
        assert ranks.size == 1
    for device in ("cuda:1", "cpu"):  # chosen, or none is used
        with join_ranks(torch.device(device)) as ranks:
            assert ranks.size == 1


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Seven sequences, which neither two nor four ranks can share evenly."""
    file = tmp_path / "ids.safetensors"
    save_file({"calibration": tiny.structured_ids(7, 32, seed=1)}, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_give_what_one_process_gives(kind: str, dense_folder: Folders, uneven: Path, tmp_path: Path) -> None:
    case, size = KINDS[kind]
    check_ranks(["slice", dense_folder(case), "--calibration", uneven, *size], tmp_path)


def counted_solves(*arguments: str) -> None:
    """Run the command line; write how often a matrix is factored, and for how many columns it is solved."""
    counts = {"factored": 0, "columns": 0}

    def counted_factor(matrix: torch.Tensor) -> torch.Tensor:
        counts["factored"] += 1
        return factor_in_place(matrix)

    def counted_solve(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        counts["columns"] += right.shape[1]
        return solve_in_place(lower, right)

    with patch.object(refit, "factor_in_place", counted_factor), patch.object(refit, "solve_in_place", counted_solve):
        sys.argv = ["eigenslice", *arguments]
        try:
            main()
        finally:
            Path(f"{arguments[-1]}.{os.environ['RANK']}.json").write_text(json.dumps(counts))


def test_ranks_share_the_solves(dense_folder: Folders, uneven: Path, tmp_path: Path) -> None:
    """Of seven factors of a fit, for six ridges and the result, each of two ranks makes four; of columns, half."""
    each: dict[int, list[dict[str, int]]] = {}
    arguments = ["slice", dense_folder("llama"), "--calibration", uneven, "--width", "24", "--neurons", "48"]
    for size in (1, 2):
        output, log = tmp_path / str(size), tmp_path / f"{size}.log"
        for rank in processes.ranks(size, *arguments, "-o", output, log=log, run=counted_solves):
            rank.join(300)
            assert rank.exitcode == 0, log.read_text()
        each[size] = [json.loads((tmp_path / f"{size}.{rank}.json").read_text()) for rank in range(size)]
    (alone,) = each[1]
    assert alone["factored"] % 7 == 0
    for counts in each[2]:
        assert counts["factored"] == alone["factored"] * 4 // 7
        assert counts["columns"] == alone["columns"] // 2


def test_own_text_is_the_first_rank_s(dense_folder: Folders, tmp_path: Path) -> None:
    model = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(model)
    text = tmp_path / "words.txt"
    text.write_text(words.text(tiny.random_ids(1, 400)[0].tolist()))
    data = ["--calibration", text, "--samples", "9", "--seqlen", "30"]
    check_ranks(["slice", model, *data, "--width", "24", "--neurons", "48"], tmp_path, (2,))


def test_ranks_wait_while_the_first_one_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL gives up after ten minutes by itself; hashing and sampling take longer."""
    waits: list[timedelta] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: waits.append(timeout))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with join_ranks(torch.device("cpu")) as ranks:
        assert not ranks.leads_node
    assert waits[0] >= timedelta(hours=12)


def on_emulated_gpu(*arguments: str) -> None:
    """Run the command line on a GPU of this process's own; NCCL isn't emulated."""
    begin = dist.init_process_group
    with (
        fake_device(int(os.environ["LOCAL_RANK"])) as gpu,
        patch.object(dist, "init_process_group", lambda backend, **options: begin("gloo", **options)),
    ):
        sys.argv = ["eigenslice", *arguments]
        try:
            main()
        finally:
            assert gpu.to_device > 0


def test_the_first_of_several_gpus_writes_own_text(dense_folder: Folders, tmp_path: Path) -> None:
    model = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(model)
    text = tmp_path / "words.txt"
    text.write_text(words.text(tiny.random_ids(1, 400)[0].tolist()))
    arguments = ["slice", model, "--calibration", text, "--samples", "9", "--seqlen", "30", "--width", "24"]
    found = []
    for size in (1, 2):
        output, log = tmp_path / str(size), tmp_path / f"{size}.log"
        for rank in processes.ranks(size, *arguments, "--device", "cuda", "-o", output, log=log, run=on_emulated_gpu):
            rank.join(300)
            assert rank.exitcode == 0, log.read_text()
        found.append(json.loads((output / "eigenslice.json").read_text())["calibration"])
    assert found[0]["own_sequences"] == 5
    assert found[1] == found[0]


@pytest.mark.parametrize("size", [["--neurons", "40"], ["--no-refit"], ["--basis", "per-block"]], ids=lambda s: s[0])
def test_ranks_measure_the_loss_that_one_process_measures(
    size: list[str], dense_folder: Folders, tmp_path: Path
) -> None:
    """One sequence is held out, which one of the ranks has."""
    file, losses = tmp_path / "ids.safetensors", []
    save_file({"calibration": tiny.structured_ids(9, 32, seed=1)}, file)
    for count in (1, 2):
        output, log = tmp_path / str(count), tmp_path / f"{count}.log"
        arguments = ["slice", dense_folder("llama"), "--calibration", file, "--width", "24", *size, "-o", output]
        for rank in processes.ranks(count, *arguments, log=log):
            rank.join(300)
            assert rank.exitcode == 0, log.read_text()
        losses.append(json.loads((output / "eigenslice.json").read_text())["loss"])
    assert losses[0]["tokens"] == 31
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def check_ranks(arguments: list[object], tmp_path: Path, sizes: tuple[int, ...] = (2, 4)) -> None:
    """So many ranks give the logits that one process gives. They find each other by what torchrun would tell them."""
    ids, logits = tiny.random_ids(3, 20), {}
    for size in (1, *sizes):
        output, log = tmp_path / str(size), tmp_path / f"{size}.log"
        for rank in processes.ranks(size, *arguments, "-o", output, log=log):
            rank.join(300)
            assert rank.exitcode == 0, log.read_text()
        assert not (tmp_path / f"{size}.partial").exists()
        with torch.no_grad():
            logits[size] = load(output)(ids).logits
    assert all(relative(logits[size], logits[1]) < 1e-5 for size in sizes)


def test_bad_input_is_one_error_on_all_ranks(dense_folder: Folders, uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    arguments = ["slice", dense_folder("llama"), "--calibration", uneven, "--width", 24, "-o", tmp_path / "out"]
    for rank in processes.ranks(2, *arguments, log=tmp_path / "log"):
        rank.join(120)
        assert rank.exitcode == 2
    found = (tmp_path / "log").read_text()
    assert "exists already" in found
    assert "Traceback" not in found


def test_a_rank_that_dies_ends_the_run(dense_folder: Folders, tmp_path: Path) -> None:
    """The others get an error, not a wait without end; what is done is kept and goes on, here under torchrun."""
    file, log = tmp_path / "ids.safetensors", tmp_path / "log"
    save_file({"calibration": tiny.structured_ids(400, 64, seed=1)}, file)
    arguments = ["slice", dense_folder("llama"), "--calibration", file, "--keep", "0.75", "-o", tmp_path / "out"]
    survivor, victim = processes.ranks(2, *arguments, log=log)
    state = tmp_path / "out.partial" / "state" / "current.json"
    deadline = time.monotonic() + 120
    while not state.exists() and survivor.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state.exists(), log.read_text()
    victim.kill()
    survivor.join(120)
    assert survivor.exitcode == 2, log.read_text()
    assert "lost the others" in log.read_text()
    assert not (tmp_path / "out").exists()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "eigenslice", *map(str, arguments), "--resume"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_sequence_is_one_ranks(size: int) -> None:
    batches = [
        Batch(torch.arange(12).view(4, 3), None, 0),
        Batch(torch.arange(12, 15).view(1, 3), torch.ones(1, 3), 1),
        Batch(torch.arange(15, 21).view(2, 3), torch.ones(2, 3), 1),
    ]
    shares = [share_batches(batches, Ranks(rank, size)) for rank in range(size)]
    sequences = [
        (tuple(row.tolist()), batch.group, batch.attention_mask is None)
        for share in shares
        for batch in share
        for row in batch.input_ids
    ]
    expected = [
        (tuple(row.tolist()), batch.group, batch.attention_mask is None) for batch in batches for row in batch.input_ids
    ]
    assert sorted(sequences) == sorted(expected)
    counts = [sum(len(batch.input_ids) for batch in share) for share in shares]
    assert max(counts) - min(counts) <= 1


def take_turns(folder: str) -> None:
    """Write this rank's number into a file for a while; two ranks at once would meet there."""
    file, seen = Path(folder) / "turn", Path(folder) / "seen"
    with join_ranks(torch.device("cpu")) as ranks:

        def turn() -> None:
            assert not file.exists()
            file.touch()
            time.sleep(0.05)
            file.unlink()
            seen.write_text(f"{seen.read_text() if seen.exists() else ''}{ranks.rank}")

        ranks.in_turns(turn)
        ranks.wait()
        with pytest.raises(EchoedError if ranks.rank == 0 else OSError):
            ranks.in_turns(lambda: None if ranks.rank == 0 else (Path(folder) / "no" / "file").touch())


def test_ranks_take_turns_and_fail_together(tmp_path: Path) -> None:
    for rank in processes.ranks(2, tmp_path, log=tmp_path / "log", run=take_turns):
        rank.join(120)
        assert rank.exitcode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "seen").read_text() == "01"
