# SPDX-License-Identifier: Apache-2.0
"""Fine-tune, sparsify, prune and recover a model of text on a GLUE task, and save what is left.

    python scripts/sparsify.py --model_name_or_path bert-base-uncased --task_name sst2 --output_dir OUT

OUT then holds an ordinary model (weights, config, tokenizer), its model card, `report.html` to look at with the same
figures as PNG files in `figures`, and `report.json` with everything measured. The task's validation sets are scored
for the report only: what is chosen on the way, such as the best checkpoint with `--eval_strategy` or the size with
`--max_metric_drop`, is chosen on a split cut from the training set.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_vdneuron.architectures import find_sublayers, is_supported
from hf_vdneuron.checkpoints import require_complete
from hf_vdneuron.cli import (
    check_counts,
    one_line_errors,
    output_folder,
    parse_args,
    print_table,
    shareable_command,
)
from hf_vdneuron.config import VDConfig
from hf_vdneuron.discovered import share_
from hf_vdneuron.evaluation import encode, evaluate_glue, make_compute_metrics
from hf_vdneuron.glue import GlueTask, glue_task, load_glue, split_off_dev, take
from hf_vdneuron.history import PosteriorCallback, report_training
from hf_vdneuron.latency import device_name
from hf_vdneuron.loading import load_classifier, load_model
from hf_vdneuron.patching import select_sublayers
from hf_vdneuron.publishing import save_report
from hf_vdneuron.report import (
    RunReport,
    kept_heads,
    report_model,
    report_score,
    report_speed,
    versions,
)
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments
from hf_vdneuron.wording import percent


#: Names of the parts of the training set.
TRAIN, DEV = "train", "dev"

#: Name of the mean over a task's metrics: what a tolerance is about, if nothing else is named.
SCORE = "score"


@dataclass
class DataArguments:
    """Which model, on which data."""

    model_name_or_path: str = field(metadata={"help": "Model to start from: a folder, or a name on the Hub."})
    task_name: str = field(
        metadata={"help": "GLUE task, such as `sst2`, or a task of your own in --dataset_dir."},
    )
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder with `<task>/{train,validation}.parquet`; by default the Hub is used."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens to which texts are truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn at random."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many rows of each set."}
    )

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If one is below 1.
        """
        check_counts(self, "max_length", "max_train_samples", "max_eval_samples")


class GlueTrainer(VDTrainer):
    """Scores the dense and the cut model on the validation sets, and everything else on a development split.

    Args:
        dev_dataset: Rows to choose by, None if nothing is evaluated on the way.
        **kwargs: Whatever `VDTrainer` takes; `eval_dataset` holds the validation sets by name.
    """

    def __init__(self, *, dev_dataset: Dataset | None, **kwargs: Any) -> None:
        self.dev_dataset = dev_dataset
        super().__init__(**kwargs)

    @property
    def choice_dataset(self) -> Dataset | None:
        """Rows that choices are made on: the development split."""
        return self.dev_dataset

    def evaluate(
        self, eval_dataset: Dataset | dict[str, Dataset] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate on a data set.

        Args:
            eval_dataset: The data set, by default the development split.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            Loss and metrics.
        """
        return super().evaluate(self.dev_dataset if eval_dataset is None else eval_dataset, *args, **kwargs)

    def milestone_score(self, milestone: str) -> float | None:
        """Look up the score of a milestone.

        Args:
            milestone: `dense` or `cut`.

        Returns:
            Mean over the validation sets, None if it was not measured.
        """
        scores = [self.milestone(f"{milestone}_{split}_score") for split in cast(dict[str, Any], self.eval_dataset)]
        known = [score for score in scores if score is not None]
        return fmean(known) if known else None


class PlanCallback(TrainerCallback):
    """Says what is going to happen."""

    def on_train_begin(
        self,
        args: VDTrainingArguments,  # type: ignore[override]  # it is only given to a `VDTrainer`
        state: TrainerState,
        control: TrainerControl,
        **run: Any,
    ) -> None:
        """Print the steps of each phase.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            control: Not used.
            **run: Not used.
        """
        if state.is_world_process_zero:
            plan = args.phase_plan(state.max_steps)
            is_closed = args.removes and plan.sparsify_steps == 0
            posterior = "a posterior in closed form" if is_closed else f"{plan.sparsify_steps} of sparsification"
            print(f"{plan.finetune_steps} steps of fine-tuning, {posterior}, {plan.recover_steps} of recovery")


@dataclass(frozen=True)
class Job:
    """Everything a run is about.

    Args:
        data_args: Which model, on which data.
        task: The task.
        rows: Rows to train on, of the development split if there is one, and of the validation sets.
        command: Command that repeats the run.
    """

    data_args: DataArguments
    task: GlueTask
    rows: dict[str, Dataset]
    command: str

    @property
    def validation_rows(self) -> dict[str, Dataset]:
        """Rows of the task's validation sets."""
        return {split: self.rows[split] for split in self.task.validation_splits}


def check_arguments(args: VDTrainingArguments) -> None:
    """Find out what is wrong with the flags before anything is loaded, and say what they leave open.

    Args:
        args: How to train.

    Raises:
        ValueError: If a batch or the run is empty, a phase has no step, a reporting package is not installed or there
            is no checkpoint to resume.
    """
    # Where the best model is loaded at the end, transformers fills in the loss.
    if args.max_metric_drop is not None and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = SCORE, True
    check_counts(args, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    if args.max_steps >= 0:
        args.phase_plan(args.max_steps)
    elif args.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` is {args.num_train_epochs}, expected a number above 0")
    if missing := sorted(set(args.report_to or []) - set(get_available_reporting_integrations())):
        raise ValueError(f"`report_to` names {', '.join(missing)}, not installed here: install it, or set it to none")
    if args.resume_from_checkpoint is not None:
        require_complete(args.resume_from_checkpoint)


def read_rows(task: GlueTask, data_args: DataArguments, args: VDTrainingArguments) -> dict[str, Dataset]:
    """Read the rows of a task, and cut a development split off the training set if something is evaluated on the way.

    Args:
        task: The task.
        data_args: Which data.
        args: How to train.

    Returns:
        Rows by split.
    """
    splits = load_glue(task, data_args.dataset_dir)
    rows = {split: take(splits[split], data_args.max_eval_samples) for split in task.validation_splits}
    train = splits[TRAIN]
    if args.eval_strategy != "no" or args.eval_on_start or args.tolerance is not None:
        train, dev = split_off_dev(train, seed=args.seed)
        rows[DEV] = take(dev, data_args.max_eval_samples)
    return {**rows, TRAIN: take(train, data_args.max_train_samples, seed=args.seed)}


def check_sublayers(model: PreTrainedModel, model_name_or_path: str, vd_config: VDConfig) -> None:
    """Find out whether a model can be patched before its texts are encoded, unless it takes these to find out.

    Args:
        model: The model.
        model_name_or_path: What it was loaded from.
        vd_config: What to patch.

    Raises:
        ValueError: If a pattern matches nothing in it.
    """
    if not is_supported(model):
        return
    try:
        select_sublayers(find_sublayers(model), vd_config)
    except ValueError as error:
        raise ValueError(f"cannot sparsify `model_name_or_path` {model_name_or_path!r}: {error}") from error


def build_trainer(job: Job, args: VDTrainingArguments, vd_config: VDConfig) -> GlueTrainer:
    """Load the model and put everything together.

    Args:
        job: What the run is about.
        args: How to train.
        vd_config: What to patch.

    Returns:
        The trainer, ready to run.
    """
    task, length, source = job.task, job.data_args.max_length, job.data_args.model_name_or_path
    set_seed(args.seed)  # the head of a pretrained model starts at random
    model, tokenizer = load_model(source, task)
    check_sublayers(model, source, vd_config)
    encoded = {name: encode(part, task, tokenizer, model.config, max_length=length) for name, part in job.rows.items()}
    return GlueTrainer(
        model=model,
        args=args,
        vd_config=vd_config,
        max_length=length,
        train_dataset=encoded[TRAIN],
        dev_dataset=encoded.get(DEV),
        eval_dataset={split: encoded[split] for split in task.validation_splits},
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(task, model.config),
        callbacks=[PosteriorCallback(), PlanCallback()],
    )


def save_model(trainer: GlueTrainer, folder: str | Path) -> None:
    """Save model, tokenizer and how the model was patched.

    Args:
        trainer: A trainer that has pruned.
        folder: Where to.
    """
    cast(PreTrainedTokenizerBase, trainer.processing_class).save_pretrained(folder)
    trainer.model.save_pretrained(folder)
    if trainer.vd_config is not None:
        trainer.vd_config.save(folder)


def load_again(trainer: GlueTrainer) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Save the pruned model aside and load it as its user will, so that what is reported is what the user gets.

    Args:
        trainer: A trainer that has pruned.

    Returns:
        Model, on the trainer's device, and tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=trainer.args.output_dir) as folder:
        save_model(trainer, folder)
        model, tokenizer = load_classifier(folder)
    return model.to(trainer.args.device), tokenizer  # type: ignore[arg-type]  # transformers wraps `to`


def report_run(trainer: GlueTrainer, job: Job, heads: list[list[int]], train_seconds: float) -> RunReport:
    """Score, count and time the pruned model.

    Args:
        trainer: A trainer that has trained and pruned.
        job: What the run was about.
        heads: Heads that were kept, of each attention block.
        train_seconds: How long training took.

    Returns:
        The report.
    """
    args, data_args = trainer.args, job.data_args
    settings = {"max_length": data_args.max_length, "batch_size": args.per_device_eval_batch_size}
    pruned, tokenizer = load_again(trainer)
    result = evaluate_glue(pruned, tokenizer, job.task, job.validation_rows, **settings)
    start, _ = load_model(data_args.model_name_or_path, job.task)
    for loaded in (start, pruned):
        share_(trainer.model, loaded)
    start.to(args.device)  # type: ignore[arg-type]  # transformers wraps `to` so that it seems unbound
    autocast = [f"{kind} autocast" for kind in ("bf16", "fp16") if getattr(args, kind)]
    return RunReport(
        base_model=model_name(data_args.model_name_or_path),
        task=job.task.name,
        target=args.goal,
        command=job.command,
        dense=report_model(start, trainer.milestone_score("dense"), precision=(*autocast, "fp32")[0]),
        pruned=report_model(pruned, result["score"]),
        kept_heads=heads,
        score_after_cut=trainer.milestone_score("cut"),
        evaluation=report_score(result, **settings),
        speedup=report_speed(start, pruned, length=data_args.max_length),
        training=report_training(trainer.state.log_history, trainer.plan, args.tolerance),
        seeds={"training": args.seed, "data order": args.seed if args.data_seed is None else args.data_seed},
        train_seconds=train_seconds,
        device=device_name(args.device),
        versions=versions(),
    )


def model_name(model_name_or_path: str) -> str:
    """Name a model without saying where on this machine it lies.

    Args:
        model_name_or_path: Folder, or name on the Hub.

    Returns:
        Name of the folder, or on the Hub.
    """
    path = Path(model_name_or_path)
    return path.absolute().name if path.exists() else model_name_or_path


def save(trainer: GlueTrainer, report: RunReport, folder: Path) -> None:
    """Write the model, its tokenizer and everything that tells of it.

    Args:
        trainer: A trainer that has pruned.
        report: What came out.
        folder: Where to.
    """
    save_report(report, trainer.model, folder)
    save_model(trainer, folder)


def print_report(report: RunReport) -> None:
    """Print the table of before and after.

    Args:
        report: What came out.
    """
    dense, pruned, speed = report.dense, report.pruned, report.speedup
    rows = [
        ["score", percent(dense.score, missing="-"), percent(pruned.score, missing="-")],
        ["right after the cut", "", percent(report.score_after_cut, missing="-")],
        ["parameters", f"{dense.parameters:,}", f"{pruned.parameters:,}"],
        ["megabytes", f"{1e-6 * dense.bytes:.1f}", f"{1e-6 * pruned.bytes:.1f}"],
        ["heads", str(sum(dense.heads_per_layer)), str(sum(pruned.heads_per_layer))],
        ["neurons", str(sum(dense.neurons_per_layer)), str(sum(pruned.neurons_per_layer))],
        ["ms per forward", f"{1e3 * speed.dense_seconds:.1f}", f"{1e3 * speed.pruned_seconds:.1f}"],
        ["speed-up of heads and neurons, counted", "", f"{speed.predicted:.2f}x"],
        ["speed-up of the whole model, measured", "", f"{speed.measured:.2f}x"],
    ]
    print_table(["", "dense", "pruned"], rows)


@one_line_errors
def main(argv: list[str]) -> None:
    """Run the job.

    Args:
        argv: Arguments without the program's name.
    """
    data_args, args, vd_config = parse_args((DataArguments, VDTrainingArguments, VDConfig), argv, description=__doc__)
    check_arguments(args)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch warns that it has nothing to pin for
    with output_folder(args.output_dir) as folder:
        task = glue_task(data_args.task_name, data_args.dataset_dir)
        command = shareable_command("scripts/sparsify.py", argv)
        job = Job(data_args, task, read_rows(task, data_args, args), command)
        trainer = build_trainer(job, args, vd_config)
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        heads = kept_heads(trainer.model, trainer.mask())
        trainer.prune()
        report = report_run(trainer, job, heads, result.metrics["train_runtime"])
        save(trainer, report, folder)
    print_report(report)


if __name__ == "__main__":
    main(sys.argv[1:])
