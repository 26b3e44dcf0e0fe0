# SPDX-License-Identifier: Apache-2.0
"""Evaluate a classifier, pruned or not, on the validation sets of GLUE.

    python scripts/run_glue.py --model_name_or_path M --task_name sst2 --output_dir E

Writes `E/eval_results.json` and prints a table. Per task there is `score`, the mean of the task's metrics, and each
metric by name; at the top, `score` is the mean over tasks. The result of a single task is at the top as well. With
`--num_resamples 1000` there is `standard_error` of each task too: how far other rows of as many would have moved it.
"""

import sys
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from datasets import Dataset

from hf_vdneuron.cli import (
    check_counts,
    choose_device,
    one_line_errors,
    output_folder,
    parse_args,
    print_table,
    write_json,
)
from hf_vdneuron.evaluation import evaluate_glue, require_resamples
from hf_vdneuron.glue import GLUE_TASKS, GlueTask, find_tasks, glue_task, load_glue, take
from hf_vdneuron.labels import fitting_tasks
from hf_vdneuron.loading import load_classifier, read_classifier_config
from hf_vdneuron.report import environment
from hf_vdneuron.wording import percent


RESULTS_FILE = "eval_results.json"
ALL_TASKS = "all"

#: Flags that decide about the scores.
REPORTED_FLAGS = (
    "model_name_or_path",
    "dataset_dir",
    "max_length",
    "max_eval_samples",
    "per_device_eval_batch_size",
    "num_resamples",
    "trust_remote_code",
)


@dataclass
class EvaluationArguments:
    """Flags of this script."""

    model_name_or_path: str = field(metadata={"help": "A fine-tuned classifier: a folder, or a name on the Hub."})
    task_name: str = field(
        metadata={
            "help": f"One of {', '.join(GLUE_TASKS)}; a variant such as qnli_devsplit in --dataset_dir; or 'all': "
            "every task (of --dataset_dir, if given) for which the model has the right number of labels."
        }
    )
    output_dir: str = field(metadata={"help": f"Folder for {RESULTS_FILE}."})
    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with <task>/validation.parquet in the schema of nyu-mll/glue; the Hub if not given."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens to which texts are truncated."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first rows of each validation set only."}
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Examples per forward pass; with the Trainer's, scores are the Trainer's too."}
    )
    num_resamples: int | None = field(
        default=None,
        metadata={
            "help": "Also tell the standard error of the score, over this many validation sets drawn from the one "
            "that there is; 1000 are plenty."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Where to compute, such as cpu or cuda:0; an accelerator if there is one."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with the model. Pruned models do not need it here."}
    )

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If one is too low.
        """
        # What can be wrong is found before the weights are loaded.
        require_resamples(self.num_resamples)
        check_counts(self, "max_length", "max_eval_samples", "per_device_eval_batch_size")


def named_tasks(args: EvaluationArguments) -> list[GlueTask]:
    """List the tasks that the flags name."""
    if args.task_name != ALL_TASKS:
        return [glue_task(args.task_name, args.dataset_dir)]
    return find_tasks(args.dataset_dir) if args.dataset_dir else list(GLUE_TASKS.values())


def validation_rows(task: GlueTask, args: EvaluationArguments) -> dict[str, Dataset]:
    """Read the validation sets of a task, as much of them as the flags ask for."""
    splits = load_glue(task, args.dataset_dir, splits=task.validation_splits)
    return {split: take(rows, args.max_eval_samples) for split, rows in splits.items()}


def evaluate(args: EvaluationArguments) -> dict[str, Any]:
    """Score the model on the tasks."""
    tasks = named_tasks(args)
    device = choose_device(args.device)
    # What can be wrong is found before the weights are loaded.
    config = read_classifier_config(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    chosen = fitting_tasks(config, tasks)
    data = {task: validation_rows(task, args) for task in chosen}
    model, tokenizer = load_classifier(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` so that it seems unbound
    results = {
        task.name: evaluate_glue(
            model,
            tokenizer,
            task,
            rows,
            max_length=args.max_length,
            batch_size=args.per_device_eval_batch_size,
            num_resamples=args.num_resamples,
        )
        for task, rows in data.items()
    }
    return {
        "score": fmean(result["score"] for result in results.values()),
        **(results[chosen[0].name] if len(chosen) == 1 else {}),
        "tasks": results,
        "skipped": [task.name for task in tasks if task not in chosen],
        **{name: value for name, value in asdict(args).items() if name in REPORTED_FLAGS},
        "environment": environment(device),
    }


def print_results(results: dict[str, Any]) -> None:
    """Print one line per task and metric."""
    rows = [
        [task, f"{result['num_examples']:,}", name, percent(value)]
        for task, result in results["tasks"].items()
        for name, value in result.items()
        if isinstance(value, float)
    ]
    print_table(["task", "examples", "metric", "percent"], rows)
    if results["skipped"]:
        print(f"skipped, as the model has another number of labels: {', '.join(results['skipped'])}")


@one_line_errors
def main(argv: list[str]) -> None:
    """Evaluate, write and print the results."""
    (args,) = parse_args([EvaluationArguments], argv, description=__doc__)
    with output_folder(args.output_dir) as folder:
        results = evaluate(args)
        write_json(folder / RESULTS_FILE, results)
    print_results(results)


if __name__ == "__main__":
    main(sys.argv[1:])
