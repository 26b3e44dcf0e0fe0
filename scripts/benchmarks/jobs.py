# SPDX-License-Identifier: Apache-2.0
"""Jobs that are done once: what came out of each is a line of a file, and several processes can share the work."""

import json
import math
import random
import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


__all__ = ["append_run", "finish", "job_of", "read_runs", "spread"]


class FinishedRun(Protocol):
    """A dataclass that holds a job beside what came out of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def job(self) -> Hashable:
        """What was to be done."""


R = TypeVar("R", bound=FinishedRun)

J = TypeVar("J", bound=Hashable)


def job_of(run: object, job_type: type[J]) -> J:
    """Tell what was to be done from what came out.

    Args:
        run: A dataclass that extends that of the job.
        job_type: The job's.

    Returns:
        The job.
    """
    return job_type(**{known.name: getattr(run, known.name) for known in fields(job_type)})  # type: ignore[arg-type]


def read_runs(path: Path, run_type: type[R]) -> dict[Hashable, R]:
    """Read the finished runs.

    Args:
        path: File with one run per line, or no file yet.
        run_type: What a line holds.

    Returns:
        Job -> its run; the first one where two processes did the same.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs: dict[Hashable, R] = {}
    for finished in (run_type(**json.loads(line)) for line in lines):
        runs.setdefault(finished.job, finished)
    return runs


def append_run(path: Path, finished: FinishedRun) -> None:
    """Add a line to the results.

    Args:
        path: File with one run per line; made if missing.
        finished: The run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:  # one write at the end of the file, whoever else writes to it
        file.write(json.dumps(asdict(finished)).encode() + b"\n")


def finish(path: Path, jobs: Iterable[Hashable], run: Callable[[Any], R], run_type: type[R]) -> list[R]:
    """Do what is missing; several processes may share the file and the work.

    Args:
        path: File with one run per line.
        jobs: What is asked for.
        run: Function from a job to its run.
        run_type: What a line holds.

    Returns:
        The run of each job, in their order.
    """
    wanted = list(jobs)
    # Read before every run, as another process may have finished jobs; in no order, as it may have begun the next one.
    while missing := set(wanted) - (runs := read_runs(path, run_type)).keys():
        append_run(path, run(random.choice(list(missing))))
    return [runs[job] for job in wanted]


def spread(values: list[float], unit: str = "") -> str:
    """Write mean and standard error.

    Args:
        values: One value per run, at least one.
        unit: What follows them.

    Returns:
        A table's cell; a single run has no error.
    """
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}{unit}"
