# SPDX-License-Identifier: Apache-2.0
"""Fine-tune, sparsify, prune and recover a model of text on a GLUE task, and save what is left.

    python scripts/sparsify.py --model_name_or_path bert-base-uncased --task_name sst2 --output_dir OUT

OUT then holds an ordinary model (weights, config, tokenizer), its model card and `report.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_vdneuron.cli import check_writable_output_dir, one_line_errors, parse_args, print_table, write_json
from hf_vdneuron.config import VDConfig
from hf_vdneuron.evaluation import encode, load_tokenizer, make_compute_metrics
from hf_vdneuron.glue import GlueTask, glue_task, load_glue, take
from hf_vdneuron.model_card import render_model_card
from hf_vdneuron.report import RunReport, dense_twin, environment, report_model, report_speed
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


@dataclass
class DataArguments:
    """Which model, on which data."""

    model_name_or_path: str = field(metadata={"help": "Model to start from: a folder, or a name on the Hub."})
    task_name: str = field(metadata={"help": "GLUE task, such as `sst2`."})
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder with `<task>/{train,validation}.parquet`; by default the Hub is used."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens to which texts are truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})


def load_model(name: str, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with a head for the task, and its tokenizer.

    Args:
        name: Folder or name on the Hub.
        task: The task, which names the labels.

    Returns:
        Both.
    """
    labels = dict(enumerate(task.label_names)) or {0: "score"}
    config = AutoConfig.from_pretrained(name)
    # A model that was fine-tuned with the same labels in another order keeps its own.
    if set((config.id2label or {}).values()) != set(labels.values()):
        config.id2label, config.label2id = labels, {label: index for index, label in labels.items()}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    return AutoModelForSequenceClassification.from_pretrained(name, config=config), load_tokenizer(name)


def build_trainer(data_args: DataArguments, args: VDTrainingArguments, vd_config: VDConfig) -> VDTrainer:
    """Load everything and put it together.

    Args:
        data_args: Which model, on which data.
        args: How to train.
        vd_config: What to patch.

    Returns:
        The trainer, ready to run.
    """
    task = glue_task(data_args.task_name, data_args.dataset_dir)
    splits = load_glue(task, data_args.dataset_dir)
    model, tokenizer = load_model(data_args.model_name_or_path, task)
    rows = {
        "train": take(splits["train"], data_args.max_train_samples, seed=args.seed),
        "eval": take(splits[task.validation_splits[0]], data_args.max_eval_samples),
    }
    encoded = {
        name: encode(part, task, tokenizer, model.config, max_length=data_args.max_length)
        for name, part in rows.items()
    }
    return VDTrainer(
        model=model,
        args=args,
        vd_config=vd_config,
        max_length=data_args.max_length,
        train_dataset=encoded["train"],
        eval_dataset=encoded["eval"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(task, model.config),
    )


def report_run(trainer: VDTrainer, data_args: DataArguments) -> RunReport:
    """Score, count and time the pruned model.

    Args:
        trainer: A trainer that has trained and pruned.
        data_args: Which model, on which data.

    Returns:
        The report.
    """
    score = trainer.evaluate()["eval_score"]
    return RunReport(
        dense=report_model(dense_twin(trainer.model), trainer.milestone("dense_score")),
        pruned=report_model(trainer.model, score),
        score_after_cut=trainer.milestone("cut_score"),
        speedup=report_speed(trainer.model, length=data_args.max_length),
        target=f"dropout rate above {trainer.args.dropout_rate_threshold}",
        task=data_args.task_name,
        seed=trainer.args.seed,
        environment=environment(trainer.args.device),
    )


def save(trainer: VDTrainer, report: RunReport, data_args: DataArguments) -> None:
    """Write model, tokenizer, report and card.

    Args:
        trainer: A trainer that has pruned.
        report: What came out.
        data_args: Which model, on which data.
    """
    output_dir = Path(str(trainer.args.output_dir))
    write_json(output_dir / "report.json", report.to_dict())
    card = render_model_card(
        report,
        base_model=Path(data_args.model_name_or_path).name,
        architecture=type(trainer.model).__name__,
        repo_id=output_dir.name,
    )
    card.save(output_dir / "README.md")
    cast(PreTrainedTokenizerBase, trainer.processing_class).save_pretrained(output_dir)
    trainer.model.save_pretrained(output_dir)


def print_report(report: RunReport) -> None:
    """Print the table of before and after.

    Args:
        report: What came out.
    """
    dense, pruned, speed = report.dense, report.pruned, report.speedup
    rows = [
        ["score", _score(dense.score), _score(pruned.score)],
        ["right after the cut", "", _score(report.score_after_cut)],
        ["parameters", f"{dense.parameters:,}", f"{pruned.parameters:,}"],
        ["heads", str(sum(dense.heads_per_layer)), str(sum(pruned.heads_per_layer))],
        ["neurons", str(sum(dense.neurons_per_layer)), str(sum(pruned.neurons_per_layer))],
        ["ms per forward", f"{1e3 * speed.dense_seconds:.1f}", f"{1e3 * speed.pruned_seconds:.1f}"],
        ["speed-up", "1.00x", f"{speed.measured:.2f}x (expected {speed.predicted:.2f}x)"],
    ]
    print_table(["", "dense", "pruned"], rows)


def _score(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.2f}"


@one_line_errors
def main(argv: list[str]) -> None:
    """Run the job.

    Args:
        argv: Arguments without the program's name.
    """
    data_args, args, vd_config = parse_args((DataArguments, VDTrainingArguments, VDConfig), argv, description=__doc__)
    check_writable_output_dir(args.output_dir)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch warns that it has nothing to pin for
    trainer = build_trainer(data_args, args, vd_config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.prune()
    report = report_run(trainer, data_args)
    save(trainer, report, data_args)
    print_report(report)


if __name__ == "__main__":
    main(sys.argv[1:])
