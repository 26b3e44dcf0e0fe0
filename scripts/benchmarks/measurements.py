# SPDX-License-Identifier: Apache-2.0
"""What a finished run is measured by: latency beside its dense twin, and its score in a new process."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.cell import EVAL_BATCH_SIZE, Cell
from hf_vdneuron.report import report_speed
from hf_vdneuron.structure import dense_twin


__all__ = ["DOORS", "commit", "latencies", "score_in_new_process"]

SCRIPTS = Path(__file__).parents[1]

#: Batch sizes and lengths at which latency is measured: one request and many, short and long.
LATENCY_GRID = ((1, 32), (1, 128), (32, 32), (32, 128))

#: Both ways to load a saved model, as flags of `run_glue.py`.
DOORS: dict[str, tuple[str, ...]] = {"hf_vdneuron": (), "trust_remote_code": ("--trust_remote_code", "True")}


def latencies(model: PreTrainedModel) -> list[dict[str, float]]:
    """Time a model and its dense twin in turns.

    Args:
        model: A model, pruned or not.

    Returns:
        For each batch size and length the predicted speed-up of the body, and the median seconds of one forward of
        `dense` and `pruned`.
    """
    dense = dense_twin(model)
    rows = []
    for batch_size, length in LATENCY_GRID:
        speed = report_speed(dense, model, length=length, batch_size=batch_size)
        seconds = {"dense": speed.dense_seconds, "pruned": speed.pruned_seconds}
        rows.append({"batch_size": batch_size, "length": length, "predicted": speed.predicted, **seconds})
    return rows


def score_in_new_process(folder: Path, cell: Cell, flags: tuple[str, ...]) -> float:
    """Score a saved model as its user would.

    Args:
        folder: Where it lies.
        cell: Task and seed.
        flags: Flags of `run_glue.py` that choose the door.

    Returns:
        The task's score.
    """
    output_dir = cell.folder / "eval"
    values = {
        "model_name_or_path": folder,
        "task_name": cell.task.name,
        "dataset_dir": cell.dataset_dir,
        "output_dir": output_dir,
        "max_length": cell.settings.max_length,
        "per_device_eval_batch_size": EVAL_BATCH_SIZE,
        "device": cell.device,
    }
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    command = [sys.executable, str(SCRIPTS / "run_glue.py"), *given, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((output_dir / "eval_results.json").read_text(encoding="utf-8"))["score"])


def commit() -> str:
    """Name the commit that is checked out.

    Returns:
        Its short hash, `-dirty` behind it if files were changed; `unknown` outside a repository.
    """
    command = ["git", "-C", str(SCRIPTS), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"
