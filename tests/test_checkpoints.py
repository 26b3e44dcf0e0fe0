"""A run that is killed anywhere ends where the uninterrupted one does, and half a checkpoint is none."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PRUNING, make_trainer, tiny_bert
from safetensors.torch import load_file
from torch import Tensor

from hf_vdneuron.checkpoints import is_complete, last_checkpoint, load_steering, open_checkpoint, save_steering


NUM_KILLS = 20

#: Seconds at most from what is waited for to the kill: from the start of a process, and from a step or a save on.
LONGEST_START, LONGEST_STEP = 1.0, 0.03

OPTIONS: dict[str, Any] = {
    "max_steps": 60,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    **(PRUNING | {"kl_weight": None, "target_speedup": 1.5}),
}


def write_checkpoint(folder: Path, state: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_the_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-9")
    expected = write_checkpoint(tmp_path / "checkpoint-10")
    write_checkpoint(tmp_path / "checkpoint-11", state='{"global_st')
    (tmp_path / "checkpoint-12").mkdir()
    write_checkpoint(tmp_path / "checkpoint-best")
    assert last_checkpoint(tmp_path) == str(expected)


def test_a_folder_without_a_complete_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-12").mkdir()
    with pytest.raises(ValueError, match=r"holds no complete checkpoint: expected .* Start the run anew"):
        last_checkpoint(tmp_path)


def test_a_checkpoint_that_is_written_again_is_not_complete_meanwhile(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    assert is_complete(folder)
    assert open_checkpoint(folder) == folder
    assert not is_complete(folder)


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(
        ValueError, match=r"checkpoint-5` is no complete checkpoint: it holds no trainer_state.json .* Resume"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("name", ["model.safetensors", "teacher.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("asked", ["by name", "for the last one"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, asked: str) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5}
    make_trainer(tmp_path, **options).train()
    file = tmp_path / "checkpoint-5" / name
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ValueError, match=f"{name}` is damaged: expected the file as the run saved it"):
        make_trainer(tmp_path, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5") if asked == "by name" else True
        )


def test_steering_survives(tmp_path: Path) -> None:
    state = {"kl_weight": 0.1 + 0.2, "cost_at_start": 3.0, "latency_table": None}
    save_steering(state, tmp_path)
    assert load_steering(tmp_path) == state
    assert load_steering(tmp_path / "elsewhere") is None


def train(output_dir: Path) -> None:
    """Train from wherever an earlier process came to, and write what is left in the end."""
    torch.set_num_threads(1)
    trainer = make_trainer(output_dir, tiny_bert(dropout=0.1), **OPTIONS)
    resumable = any(is_complete(folder) for folder in output_dir.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumable)
    trainer.prune().save_pretrained(output_dir / "pruned")


@pytest.fixture(scope="module")
def processes() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Processes that start with everything imported, so that most of a life is training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoints"])
    return context


def weights(output_dir: Path) -> dict[str, Tensor]:
    return load_file(output_dir / "pruned" / "model.safetensors")


def saving(output_dir: Path) -> set[str]:
    """Checkpoints that have been begun."""
    return {folder.name for folder in output_dir.glob("checkpoint-*") if not is_complete(folder)}


def last_step(output_dir: Path) -> int:
    """Step of the last complete checkpoint."""
    complete = (folder.name for folder in output_dir.glob("checkpoint-*") if is_complete(folder))
    return max((int(name.rpartition("-")[2]) for name in complete), default=0)


def wait_for_a_save(process: multiprocessing.process.BaseProcess, output_dir: Path) -> None:
    before = saving(output_dir)
    while process.exitcode is None and not saving(output_dir) - before:
        pass


def wait_for_a_step(process: multiprocessing.process.BaseProcess, output_dir: Path) -> None:
    before = last_step(output_dir)
    while process.exitcode is None and last_step(output_dir) == before:
        pass


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_where_it_would_have(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    chance, kills, in_a_save, killed_at = random.Random(0), 0, 0, set()
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    while not (killed / "pruned").exists():
        process = processes.Process(target=train, args=(killed,))
        process.start()
        if kills == NUM_KILLS:
            process.join()
        elif kills % 4 == 0:
            process.join(chance.uniform(0, LONGEST_START))
        else:
            (wait_for_a_save if kills % 2 else wait_for_a_step)(process, killed)
            process.join(chance.uniform(0, LONGEST_STEP))
        if process.exitcode is None:
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            in_a_save += bool(saving(killed))
            killed_at |= {folder.name for folder in killed.glob("checkpoint-*")}
        assert process.exitcode in {0, -signal.SIGKILL}
    train(whole)
    expected, found = weights(whole), weights(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert (killed / "pruned" / "config.json").read_text() == (whole / "pruned" / "config.json").read_text()
    # Else it would have shown little.
    assert kills == NUM_KILLS
    assert in_a_save >= NUM_KILLS // 4
    assert len(killed_at) >= NUM_KILLS // 4


def test_what_the_killed_run_goes_through(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **OPTIONS)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())
    assert len({logs["kl_weight"] for logs in state["log_history"] if logs.get("kl_weight")}) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-58", "checkpoint-59", "checkpoint-60"]
