"""Classifiers on GLUE: labels are matched by name, and scores are those of a Trainer and of a slow loop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from glue_samples import columns_for, tiny_classifier, tiny_tokenizer
from pruned_models import CONFIGS, cut_
from transformers import (
    AutoModel,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_vdneuron.evaluation import (
    class_order,
    encode,
    evaluate_glue,
    fitting_tasks,
    load_classifier,
    make_compute_metrics,
    read_classifier_config,
)
from hf_vdneuron.glue import GLUE_TASKS, GlueMetric, GlueTask
from hf_vdneuron.structure import as_pruned_model_


TASKS = [pytest.param(task, id=name) for name, task in GLUE_TASKS.items()]
MAX_LENGTH, BATCH_SIZE = 8, 4


def rows_of(task: GlueTask) -> dict[str, Dataset]:
    """Rows of each validation split; splits have different sizes."""
    return {split: Dataset.from_dict(columns_for(task, 6 + 3 * i)) for i, split in enumerate(task.validation_splits)}


def config_with(names: Sequence[str]) -> PreTrainedConfig:
    return BertConfig(id2label=dict(enumerate(names)), num_labels=len(names))


def evaluate(model: PreTrainedModel, task: GlueTask, rows: dict[str, Dataset]) -> dict[str, Any]:
    return evaluate_glue(model, tiny_tokenizer(), task, rows, max_length=MAX_LENGTH, batch_size=BATCH_SIZE)


@torch.no_grad()
def slow_predictions(model: PreTrainedModel, task: GlueTask, rows: Dataset) -> list[float]:
    """One row at a time, without padding."""
    tokenizer, predictions = tiny_tokenizer(), []
    for row in rows:
        texts = [row[column] for column in task.text_columns]
        logits = model(**tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")).logits[0]
        predictions.append(logits[0].item() if task.is_regression else logits.argmax().item())
    return predictions


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        pytest.param("sst2", ["LABEL_0", "LABEL_1"], (0, 1), id="unnamed"),
        pytest.param("sst2", ["negative", "positive"], (0, 1), id="same"),
        pytest.param("sst2", ["POSITIVE", "NEGATIVE"], (1, 0), id="swapped"),
        pytest.param("sst2", ["good", "bad"], (0, 1), id="others"),
        pytest.param("mrpc", ["Equivalent", "Not equivalent"], (1, 0), id="spelled with a space"),
        pytest.param("mnli", ["neutral", "contradiction", "entailment"], (2, 0, 1), id="rotated"),
        pytest.param("stsb", ["LABEL_0"], (0,), id="regression"),
    ],
)
def test_labels_are_matched_by_name(task: str, names: list[str], expected: tuple[int, ...]) -> None:
    assert class_order(config_with(names), GLUE_TASKS[task]) == expected


@pytest.mark.parametrize("task", TASKS)
def test_another_number_of_labels_is_refused(task: GlueTask) -> None:
    config = config_with([f"LABEL_{index}" for index in range(4)])
    message = rf"{task.name} needs a model with {task.num_labels} .*got one with 4"
    with pytest.raises(ValueError, match=message):
        class_order(config, task)
    with pytest.raises(ValueError, match=message):
        fitting_tasks(config, [task])


def test_fitting_tasks_are_those_with_as_many_labels() -> None:
    tasks = list(GLUE_TASKS.values())
    assert fitting_tasks(config_with("abc"), tasks) == [GLUE_TASKS["mnli"]]
    assert fitting_tasks(config_with("a"), tasks) == [GLUE_TASKS["stsb"]]
    assert len(fitting_tasks(config_with("ab"), tasks)) == 7


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
    model, rows = tiny_classifier(task.num_labels), rows_of(task)
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


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_saved_classifier_scores_the_same(family: str, pruned: bool, tmp_path: Path) -> None:
    task, model = GLUE_TASKS["sst2"], tiny_classifier(2, family)
    if pruned:
        model = as_pruned_model_(cut_(model))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert read_classifier_config(str(tmp_path)).num_labels == 2
    loaded, tokenizer = load_classifier(str(tmp_path))
    rows = rows_of(task)
    result = evaluate_glue(loaded, tokenizer, task, rows, max_length=MAX_LENGTH, batch_size=BATCH_SIZE)
    assert result == evaluate(model, task, rows)


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(CONFIGS["bert"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds \['BertModel'\], expected a class ending in ForSequenceClass.*: fine"
    ):
        read_classifier_config(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such-model", "not there at all"])
def test_a_model_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot load `model_name_or_path` '{name}': give a folder"):
        read_classifier_config(name)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_blank_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    tiny_classifier(2, family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load the tokenizer of `model_name_or_path` '{tmp_path}': save it"):
        load_classifier(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_classifier(2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer of"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("trust_remote_code", [False, True], ids=["package", "remote code"])
@pytest.mark.parametrize("damage", ["short file", "other sizes"])
def test_damaged_weights_are_refused(damage: str, trust_remote_code: bool, tmp_path: Path) -> None:
    tiny_classifier(2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if damage == "short file":
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        config = tiny_classifier(2).config
        config.intermediate_size += 1
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"annot load .*{tmp_path}"):
        load_classifier(str(tmp_path), trust_remote_code=trust_remote_code)
