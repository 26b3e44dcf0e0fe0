"""Classifiers on GLUE: rows are encoded as one by one, and scores are those of a Trainer and of a slow loop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from glue_samples import (
    BATCH_SIZE,
    MAX_LENGTH,
    TASKS,
    columns_for,
    config_with,
    evaluate,
    rows_of,
    tiny_classifier,
    tiny_tokenizer,
)
from scipy.stats import bootstrap
from transformers import (
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_vdneuron.evaluation import encode, make_compute_metrics
from hf_vdneuron.glue import GLUE_TASKS, GlueMetric, GlueTask


@torch.no_grad()
def slow_predictions(model: PreTrainedModel, task: GlueTask, rows: Dataset) -> list[float]:
    """One row at a time, without padding."""
    tokenizer, predictions = tiny_tokenizer(), []
    for row in rows:
        texts = [row[column] for column in task.text_columns]
        logits = model(**tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")).logits[0]
        predictions.append(logits[0].item() if task.is_regression else logits.argmax().item())
    return predictions


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_encoded_as_one_by_one(task: GlueTask) -> None:
    names = task.label_names[::-1]
    (rows, *_), tokenizer = rows_of(task).values(), tiny_tokenizer()
    encoded = encode(rows, task, tokenizer, config_with(names or "a"), max_length=MAX_LENGTH)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    for row, result in zip(rows, encoded, strict=True):
        texts = [row[column] for column in task.text_columns]
        expected = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        label = row["label"] if task.is_regression else names.index(task.label_names[row["label"]])
        assert result == {**expected, "labels": label}
    assert max(map(len, encoded["input_ids"])) <= MAX_LENGTH


@pytest.mark.parametrize(("tokenizer_limit", "model_limit"), [(8, 512), (512, 8)], ids=["tokenizer", "model"])
def test_texts_longer_than_the_model_reads_are_refused(tokenizer_limit: int, model_limit: int) -> None:
    task, tokenizer = GLUE_TASKS["rte"], tiny_tokenizer()
    tokenizer.model_max_length = tokenizer_limit
    config = BertConfig(max_position_embeddings=model_limit)
    assert encode(*rows_of(task).values(), task, tokenizer, config, max_length=8)
    with pytest.raises(ValueError, match="`max_length` is 9, but the model reads at most 8 tokens"):
        encode(*rows_of(task).values(), task, tokenizer, config, max_length=9)


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, None)], ids=["array", "tuple"])
def test_metrics_are_computed_in_the_order_of_the_data_set(wrap: Callable[[np.ndarray], object]) -> None:
    task, config = GLUE_TASKS["mnli"], config_with(["neutral", "contradiction", "entailment"])
    labels, guesses = [0, 1, 2, 2, 1, 0], [0, 1, 2, 0, 0, 0]  # of the data set
    of_model = {0: 2, 1: 0, 2: 1}
    logits = np.zeros((6, 3))
    logits[range(6), [of_model[guess] for guess in guesses]] = 1
    result = make_compute_metrics(task, config)(EvalPrediction(wrap(logits), np.array([of_model[x] for x in labels])))
    assert result == {"score": pytest.approx(4 / 6), "accuracy": pytest.approx(4 / 6)}


def test_f1_counts_the_positive_class_of_the_data_set() -> None:
    config = config_with(["equivalent", "not_equivalent"])
    logits = np.eye(2)[[0, 0, 1, 0]]  # equivalent, equivalent, not, equivalent
    result = make_compute_metrics(GLUE_TASKS["mrpc"], config)(EvalPrediction(logits, np.array([0, 1, 1, 1])))
    assert result["f1"] == pytest.approx(2 * 1 / (2 * 1 + 2 + 0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_refused(value: float) -> None:
    logits = np.array([[0.0, 1.0], [value, 0.0]])
    with pytest.raises(ValueError, match="outputs for sst2 hold NaN or infinity"):
        make_compute_metrics(GLUE_TASKS["sst2"], config_with("ab"))(EvalPrediction(logits, np.array([0, 1])))


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_a_slow_loop(task: GlueTask) -> None:
    model, rows = tiny_classifier(task.num_labels).train(), rows_of(task)
    result = evaluate(model, task, rows)
    assert not model.training
    metric, per_split = GlueMetric(task.name, keep_in_memory=True), {}
    for split, part in rows.items():
        predictions = slow_predictions(model, task, part)
        assert len(set(predictions)) > 1
        per_split[split] = metric.compute(predictions=predictions, references=part["label"][:])
    expected = {name: sum(m[name] for m in per_split.values()) / len(per_split) for name in (*task.metrics, "score")}
    if task.name == "mnli":
        for kind in ("matched", "mismatched"):
            expected[f"accuracy_{kind}"] = per_split[f"validation_{kind}"]["accuracy"]
    assert {name: value for name, value in result.items() if isinstance(value, float)} == pytest.approx(
        expected,
        abs=1e-3,  # padding changes the last digits of logits, and a correlation magnifies them
    )
    assert result["num_examples"] == sum(map(len, rows.values()))
    assert result["split"] == "+".join(task.validation_splits)


@pytest.mark.parametrize("task", [GLUE_TASKS["stsb"], GLUE_TASKS["qnli"]], ids=["stsb", "qnli"])
def test_scores_equal_the_trainers_to_the_last_digit(task: GlueTask, tmp_path: Path) -> None:
    # Labels of 24 rows are no whole numbers, and fp32 is not exact for them.
    model, rows = tiny_classifier(task.num_labels), {"validation": Dataset.from_dict(columns_for(task, 24))}
    args = TrainingArguments(
        tmp_path, per_device_eval_batch_size=BATCH_SIZE, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        eval_dataset=encode(rows["validation"], task, tiny_tokenizer(), model.config, max_length=MAX_LENGTH),
        compute_metrics=make_compute_metrics(task, model.config),
    )
    expected, result = trainer.evaluate(), evaluate(model, task, rows)
    assert {f"eval_{name}": result[name] for name in ("score", *task.metrics)}.items() <= expected.items()


def test_a_model_with_swapped_names_scores_the_same() -> None:
    task = GLUE_TASKS["mrpc"]
    rows = rows_of(task)
    model = tiny_classifier(2, label_names=task.label_names)
    expected = evaluate(model, task, rows)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    assert evaluate(model, task, rows) != expected
    model.config.id2label = dict(enumerate(task.label_names[::-1]))
    assert evaluate(model, task, rows) == expected


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli"])
def test_the_standard_error_is_that_of_scipys_bootstrap(name: str) -> None:
    task = GLUE_TASKS[name]
    rows = {split: Dataset.from_dict(columns_for(task, 60)) for split in task.validation_splits}
    model = tiny_classifier(task.num_labels)
    result = evaluate(model, task, rows, num_resamples=200)
    plain = evaluate(model, task, rows)
    assert {key: value for key, value in result.items() if key != "standard_error"} == plain
    metric, variance = GlueMetric(task.name), 0.0
    for split in rows.values():
        expected = bootstrap(
            (slow_predictions(model, task, split), split["label"]),
            lambda predicted, true: metric.compute(predictions=predicted, references=true)["score"],
            n_resamples=200,
            paired=True,
            vectorized=False,
            method="percentile",
            rng=1,
        )
        variance += expected.standard_error**2
    assert result["standard_error"] == pytest.approx(variance**0.5 / len(rows), rel=0.2)
    assert result["standard_error"] > 0
