# SPDX-License-Identifier: Apache-2.0
"""What a finished run is measured by: latency beside its dense twin, and its score in a new process."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.cell import Cell
from hf_vdneuron.budget import body_cost, cost_ratio
from hf_vdneuron.latency import measure_latency
from hf_vdneuron.structure import dense_twin


__all__ = ["DOORS", "commit", "latencies", "score_in_new_process"]

SCRIPTS = Path(__file__).parents[1]

#: Both ways to load a saved model, as flags of the scripts that score one.
DOORS: dict[str, tuple[str, ...]] = {"hf_vdneuron": (), "trust_remote_code": ("--trust_remote_code", "True")}


def latencies(cell: Cell, model: PreTrainedModel) -> list[dict[str, float]]:
    """Time a model and its dense twin in turns.

    Args:
        cell: Task and seed.
        model: A model, pruned or not.

    Returns:
        For each batch size and length the predicted speed-up of the body, and the median seconds of one forward of
        `dense` and `pruned`.
    """
    dense = dense_twin(model)
    rows = []
    for batch_size, length in cell.latency_grid:
        full, body = (body_cost(either, length=length).macs for either in (dense, model))
        seconds = measure_latency({"dense": dense, "pruned": model}, cell.latency_inputs(batch_size, length))
        rows.append({"batch_size": batch_size, "length": length, "predicted": cost_ratio(full, body), **seconds})
    return rows


def score_in_new_process(cell: Cell, folder: Path, flags: tuple[str, ...]) -> float:
    """Score a saved model as its user would.

    Args:
        cell: Task and seed.
        folder: Where the model lies.
        flags: Flags that choose the door.

    Returns:
        The task's score.
    """
    output_dir = cell.folder / "eval"
    script, *given = cell.score_command(folder, output_dir)
    subprocess.run([sys.executable, str(SCRIPTS / script), *given, *flags], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((output_dir / "eval_results.json").read_text(encoding="utf-8"))["score"])


def commit() -> str:
    """Name the commit that is checked out.

    Returns:
        Its short hash, `-dirty` behind it if files were changed; `unknown` outside a repository.
    """
    command = ["git", "-C", str(SCRIPTS), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"
