"""GLUE: rows are read and checked, encoded as the model numbers labels, and scored as slow loops would."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from glue_samples import NUM_ROWS, columns_for, labels_for, write_task

from hf_vdneuron.glue import (
    GLUE_TASKS,
    GlueMetric,
    GlueTask,
    find_tasks,
    glue_task,
    load_glue,
    split_off_dev,
    take,
)


TASKS = [pytest.param(task, id=name) for name, task in GLUE_TASKS.items()]

# From the task descriptions of nyu-mll/glue, independent of the table under test.
EXPECTED = {
    "cola": (["sentence"], 2, ["matthews_correlation"]),
    "sst2": (["sentence"], 2, ["accuracy"]),
    "mrpc": (["sentence1", "sentence2"], 2, ["accuracy", "f1"]),
    "stsb": (["sentence1", "sentence2"], 1, ["pearson", "spearmanr"]),
    "qqp": (["question1", "question2"], 2, ["accuracy", "f1"]),
    "mnli": (["premise", "hypothesis"], 3, ["accuracy"]),
    "qnli": (["question", "sentence"], 2, ["accuracy"]),
    "rte": (["sentence1", "sentence2"], 2, ["accuracy"]),
    "wnli": (["sentence1", "sentence2"], 2, ["accuracy"]),
}


def slow_accuracy(references: Sequence[float], predictions: Sequence[float]) -> float:
    hits = 0
    for truth, guess in zip(references, predictions, strict=True):
        hits += truth == guess
    return hits / len(references)


def counts(references: Sequence[float], predictions: Sequence[float]) -> tuple[int, int, int, int]:
    """True positives, true negatives, false positives, false negatives."""
    pairs = list(zip(references, predictions, strict=True))
    return tuple(pairs.count(pair) for pair in [(1, 1), (0, 0), (0, 1), (1, 0)])


def slow_f1(references: Sequence[float], predictions: Sequence[float]) -> float:
    tp, _, fp, fn = counts(references, predictions)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def slow_matthews(references: Sequence[float], predictions: Sequence[float]) -> float:
    tp, tn, fp, fn = counts(references, predictions)
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def slow_pearson(xs: Sequence[float], ys: Sequence[float]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    variances = sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys)
    return covariance / math.sqrt(variances) if variances else 0.0


def slow_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def slow_spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    return slow_pearson(slow_ranks(xs), slow_ranks(ys))


ORACLES = {
    "accuracy": slow_accuracy,
    "f1": slow_f1,
    "matthews_correlation": slow_matthews,
    "pearson": slow_pearson,
    "spearmanr": slow_spearman,
}


@pytest.mark.parametrize("task", TASKS)
def test_table_says_what_the_paper_says(task: GlueTask) -> None:
    columns, num_labels, metrics = EXPECTED[task.name]
    assert (list(task.text_columns), task.num_labels, list(task.metrics)) == (columns, num_labels, metrics)
    assert len(task.validation_splits) == (2 if task.name == "mnli" else 1)


def test_a_variant_keeps_its_name_and_reads_like_its_family() -> None:
    variant = glue_task("qnli_devsplit")
    assert variant.name == "qnli_devsplit"
    assert (variant.text_columns, variant.label_names) == (
        GLUE_TASKS["qnli"].text_columns,
        GLUE_TASKS["qnli"].label_names,
    )


@pytest.mark.parametrize("name", ["", "imdb", "SST2", "all"])
def test_an_unknown_task_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"`task_name` is '{name}', expected one of {', '.join(GLUE_TASKS)}"):
        glue_task(name)


@pytest.mark.parametrize(("name", "meant"), [("sst22", "sst2"), ("mprc", "mrpc"), ("SST2", None)])
def test_a_slip_is_guessed(name: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match="expected one of") as error:
        glue_task(name)
    assert str(error.value).endswith(f"Did you mean {meant}?" if meant else "validation.parquet")


def test_a_task_of_ones_own_says_itself_what_it_holds(tmp_path: Path) -> None:
    features = Features({
        "question": Value("string"),
        "answer": Value("string"),
        "label": ClassLabel(names=["a", "b"]),
    })
    rows = {"question": ["x", "y"], "answer": ["z", "w"], "label": [0, 1]}
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    task = glue_task("mine", tmp_path)
    assert task == GlueTask("mine", ("question", "answer"), ("a", "b"), ("accuracy",))
    assert len(load_glue(task, tmp_path)["train"]) == 2
    scores = GlueMetric("mine", keep_in_memory=True).compute(predictions=[0, 0], references=[0, 1])
    assert scores == {"score": 0.5, "accuracy": 0.5}


def test_a_task_of_ones_own_must_name_its_classes(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Dataset.from_dict({"sentence": ["x"], "label": [0]}).to_parquet(tmp_path / "mine" / "validation.parquet")
    with pytest.raises(ValueError, match="ClassLabel"):
        glue_task("mine", tmp_path)


def test_a_damaged_task_of_ones_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "validation.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(ValueError, match=rf"{tmp_path}/mine/validation.parquet is not a readable parquet file"):
        glue_task("mine", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_metrics_equal_slow_loops(task: GlueTask) -> None:
    rng = np.random.default_rng(0)
    metric = GlueMetric(task.name, keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    for _ in range(5):
        if task.is_regression:
            references, predictions = rng.integers(0, 6, 40) / 1.0, rng.normal(2.5, 2, 40).round(1)  # with ties
        else:
            references, predictions = rng.integers(0, task.num_labels, (2, 40))
        result = metric.compute(references=references, predictions=predictions)
        expected = {name: ORACLES[name](references.tolist(), predictions.tolist()) for name in EXPECTED[task.name][2]}
        expected["score"] = sum(expected.values()) / len(expected)
        assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_constant_predictions_score_without_a_warning(task: GlueTask) -> None:
    references = labels_for(task)
    result = GlueMetric(task.name, keep_in_memory=True).compute(references=references, predictions=[0] * NUM_ROWS)
    assert result == pytest.approx({
        **{name: ORACLES[name](references, [0] * NUM_ROWS) for name in task.metrics},
        "score": sum(ORACLES[name](references, [0] * NUM_ROWS) for name in task.metrics) / len(task.metrics),
    })


@pytest.mark.parametrize("task", TASKS)
def test_rows_come_back_as_written(task: GlueTask, tmp_path: Path) -> None:
    data = load_glue(task, write_task(tmp_path, task), splits=task.validation_splits)
    assert set(data) == set(task.validation_splits)
    for dataset in data.values():
        assert dataset.to_dict() == columns_for(task)


def test_training_rows_are_read_too(tmp_path: Path) -> None:
    task = GLUE_TASKS["rte"]
    write_task(tmp_path, task)
    with pytest.raises(FileNotFoundError, match=r"train\.parquet does not exist, its folder holds \['validation"):
        load_glue(task, tmp_path)
    pq.write_table(pa.table(columns_for(task, 3)), tmp_path / "rte" / "train.parquet")
    assert {split: len(rows) for split, rows in load_glue(task, tmp_path).items()} == {
        "train": 3,
        "validation": NUM_ROWS,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"sentence": None}, r"lacks the columns \['sentence'\]: found \['label', 'idx'\]", id="no text"),
        pytest.param({"label": None}, r"lacks the columns \['label'\]", id="no label"),
        pytest.param({"sentence": list(range(6))}, "`sentence`: found int64", id="text is a number"),
        pytest.param({"sentence": ["a", None, *"bcde"]}, "string with 1 nulls", id="text is missing"),
        pytest.param({"label": [0, 1, 2, 0, 1, 2]}, "found 2 in row 2, expected integers from 0 to 1", id="too large"),
        pytest.param({"label": [-1] * 6}, "found -1 in row 0.*test sets of GLUE have no labels", id="test set"),
        pytest.param({"label": [0, 1, 0, None, 0, 1]}, "found nan in row 3", id="label is missing"),
        pytest.param({"label": list("010101")}, "found string, expected integers", id="label is a string"),
        pytest.param({"label": [0.5] * 6}, "found double, expected integers", id="label is a fraction"),
        pytest.param({"sentence": [], "label": [], "idx": []}, "is empty, expected at least one row", id="empty"),
    ],
)
def test_wrong_rows_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = GLUE_TASKS["sst2"]
    with pytest.raises(ValueError, match=message) as error:
        load_glue(task, write_task(tmp_path, task, **changes), splits=["validation"])
    assert "sst2/validation" in str(error.value)


@pytest.mark.parametrize("label", [5.1, -0.1, math.nan], ids=["above", "below", "nan"])
def test_similarity_out_of_range_is_refused(label: float, tmp_path: Path) -> None:
    task = GLUE_TASKS["stsb"]
    with pytest.raises(ValueError, match=r"in row 5, expected numbers from 0 to 5"):
        load_glue(task, write_task(tmp_path, task, label=[0, 1, 2, 3, 4, label]), splits=["validation"])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write_task(tmp_path, GLUE_TASKS["sst2"]) / "sst2" / "validation.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"validation\.parquet is not a readable parquet file"):
        load_glue(GLUE_TASKS["sst2"], tmp_path, splits=["validation"])


@pytest.mark.parametrize("task", TASKS)
def test_rows_come_from_the_hub(task: GlueTask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, split: list[str]) -> list[Dataset]:
        asked.append((*args, split))
        return [Dataset.from_dict(columns_for(task, 2 + index)) for index in range(len(split))]

    monkeypatch.setattr("hf_vdneuron.glue.load_dataset", load_dataset)
    data = load_glue(task)
    assert asked == [("nyu-mll/glue", task.name, ["train", *task.validation_splits])]
    assert [len(rows) for rows in data.values()] == [2, 3, 4][: 1 + len(task.validation_splits)]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("hf_vdneuron.glue.load_dataset", load_dataset)
    with pytest.raises(
        ConnectionError, match=r"nyu-mll/glue/sst2 from the Hub: check the conn.* give `dataset_dir`.*no route"
    ):
        load_glue(GLUE_TASKS["sst2"], splits=["validation"])


def test_a_variant_is_not_on_the_hub() -> None:
    with pytest.raises(ValueError, match=r"'qnli_devsplit' is not on the Hub: give `dataset_dir`"):
        load_glue(glue_task("qnli_devsplit"))


def test_tasks_are_found_by_their_folders(tmp_path: Path) -> None:
    for name in ("sst2", "imdb", "qnli_devsplit", "cola"):
        (tmp_path / name).mkdir()
    (tmp_path / "rte").touch()
    assert [task.name for task in find_tasks(tmp_path)] == ["cola", "qnli_devsplit", "sst2"]
    with pytest.raises(ValueError, match=r"expected folders named as GLUE tasks"):
        find_tasks(tmp_path / "imdb")


def test_take_limits_rows() -> None:
    rows = Dataset.from_dict({"idx": list(range(50))})
    assert take(rows, None) is rows
    assert take(rows, 3)["idx"] == [0, 1, 2]
    assert len(take(rows, 51)) == 50
    shuffled = take(rows, 10, seed=1)["idx"]
    assert list(shuffled) == list(take(rows, 10, seed=1)["idx"])
    assert list(shuffled) != list(take(rows, 10, seed=2)["idx"])
    with pytest.raises(ValueError, match="number of samples is 0, expected at least 1"):
        take(rows, 0)


@pytest.mark.parametrize(("num_rows", "num_dev"), [(2, 1), (95, 10), (30000, 2000)])
def test_the_development_split_partitions_the_training_set(num_rows: int, num_dev: int) -> None:
    rows = Dataset.from_dict({"idx": list(range(num_rows))})
    train, dev = split_off_dev(rows, seed=0)
    assert len(dev) == num_dev
    assert sorted(train["idx"][:] + dev["idx"][:]) == list(range(num_rows))
    assert dev["idx"][:] == split_off_dev(rows, seed=0)[1]["idx"][:]


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="training set has 1 rows, expected at least 2"):
        split_off_dev(Dataset.from_dict({"idx": [0]}), seed=0)
