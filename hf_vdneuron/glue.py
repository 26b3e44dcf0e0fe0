# SPDX-License-Identifier: Apache-2.0
"""The nine GLUE tasks: what they read, how predictions are scored, where the rows come from.

Choices (hyperparameters, checkpoint, tolerance) belong on a split cut from the training set, `split_off_dev`; the
official validation sets are for the one score of a finished run.

References:
    Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", 2018,
    https://arxiv.org/abs/1804.07461
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.table import InMemoryTable
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


__all__ = [
    "GLUE_TASKS",
    "HUB_DATASET",
    "LABEL_COLUMN",
    "GlueMetric",
    "GlueTask",
    "find_tasks",
    "glue_task",
    "load_glue",
    "split_off_dev",
    "take",
]

T = TypeVar("T")

#: Where the tasks live on the Hub.
HUB_DATASET = "nyu-mll/glue"

#: Name of the column with labels, in every task.
LABEL_COLUMN = "label"

#: Texts that a tokenizer joins into one sequence.
MAX_TEXT_COLUMNS = 2

#: How a task of one's own is scored.
_OWN_METRICS = ("accuracy",)

#: STS-B's similarity judgements (Wang 2018, section 3.2, "a similarity score from 1 to 5"; the data hold 0 too).
SIMILARITY_RANGE = (0, 5)

#: Size of a development split: enough that an accuracy of 90 % has a standard error of 0.7 points, and never more than
#: a tenth of the training set.
DEV_ROWS = 2000
DEV_FRACTION = 0.1
MIN_ROWS_TO_SPLIT = 2


@dataclass(frozen=True)
class GlueTask:
    """What one task reads and how it is scored.

    Args:
        name: Name of the task, or of an unofficial variant of it.
        text_columns: Columns with text, one or two.
        label_names: Names of the classes in the order of their labels; empty for regression.
        metrics: Names of its metrics, keys of `METRICS`.
        validation_splits: Its labelled evaluation sets.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers instead of classes."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of outputs of a model for the task."""
        return len(self.label_names) or 1

    @property
    def label_range(self) -> tuple[int, int]:
        """Smallest and largest label."""
        return SIMILARITY_RANGE if self.is_regression else (0, self.num_labels - 1)


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")
_BOTH = ("validation_matched", "validation_mismatched")

_TASKS = (
    GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    GlueTask("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    GlueTask("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    GlueTask("stsb", _SENTENCES, (), ("pearson", "spearmanr")),
    GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    GlueTask("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), _BOTH),
    GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    GlueTask("rte", _SENTENCES, _ENTAILMENT, ("accuracy",)),
    GlueTask("wnli", _SENTENCES, _ENTAILMENT[::-1], ("accuracy",)),
)

#: The nine tasks by name, in the order of the GLUE paper.
GLUE_TASKS = {task.name: task for task in _TASKS}


def glue_task(name: str, dataset_dir: str | Path | None = None) -> GlueTask:
    """Look up a task.

    Args:
        name: A key of `GLUE_TASKS`; or one followed by `_` and more: an unofficial variant such as `qnli_devsplit`,
            which is read and scored like the official task but keeps its own name; or, with `dataset_dir`, a task of
            one's own.
        dataset_dir: Folder with `<name>/validation.parquet`. In a task of one's own the strings of that file are its
            texts, its `label` is a `datasets.ClassLabel`, which names the classes, and its score is the accuracy.

    Returns:
        The task, under the given name.

    Raises:
        ValueError: The name is neither, or one's own file does not say what it holds.
    """
    official = _official(name)
    if official is not None:
        return replace(official, name=name)
    path = Path(dataset_dir or "") / name / "validation.parquet"
    if dataset_dir is None or not path.is_file():
        near = get_close_matches(name, GLUE_TASKS, n=1)
        raise ValueError(
            f"`task_name` is {name!r}, expected one of {', '.join(GLUE_TASKS)}, or one of these plus `_` and more, or "
            "the name of a folder in `dataset_dir` with train.parquet and validation.parquet"
            f"{f'. Did you mean {near[0]}?' if near else ''}"
        )
    return _own_task(name, path)


def _official(name: str) -> GlueTask | None:
    return GLUE_TASKS.get(name.split("_", maxsplit=1)[0])


def _own_task(name: str, path: Path) -> GlueTask:
    features = Features.from_arrow_schema(_read_parquet(path, pq.read_schema))
    texts = tuple(column for column, feature in features.items() if feature == Value("string"))
    label = features.get(LABEL_COLUMN)
    if not isinstance(label, ClassLabel) or not 1 <= len(texts) <= MAX_TEXT_COLUMNS:
        raise ValueError(
            f"{path} has the features {dict(features)}, expected one or two strings and a `{LABEL_COLUMN}` of type "
            "ClassLabel: write it with `datasets`, which keeps the names of the classes"
        )
    return GlueTask(name, texts, tuple(label.names), _OWN_METRICS)


def _correlation(statistic: Callable[..., Any], references: Sequence[float], predictions: Sequence[float]) -> float:
    # A constant correlates with nothing. Matthews' coefficient has the same convention.
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return statistic(references, predictions).statistic


#: Metrics by name: functions of references and predictions, higher is better.
METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": partial(_correlation, pearsonr),
    "spearmanr": partial(_correlation, spearmanr),
}


class GlueMetric(evaluate.Metric):
    """The metrics of one task, and `score`, their mean.

    Args:
        config_name: Name of the task.
    """

    def _info(self) -> evaluate.MetricInfo:
        task = _official(self.config_name)
        value = Value("float64" if task is not None and task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Wang et al., 2018, https://arxiv.org/abs/1804.07461",
            inputs_description="Predicted labels and true labels, in the numbering of the data set.",
            features=Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        task = _official(self.config_name)
        names = _OWN_METRICS if task is None else task.metrics
        values = {name: float(METRICS[name](references, predictions)) for name in names}
        return {"score": fmean(values.values()), **values}


def find_tasks(dataset_dir: str | Path) -> list[GlueTask]:
    """List the tasks that a folder holds.

    Args:
        dataset_dir: Folder with one folder per task.

    Returns:
        Tasks in alphabetical order, at least one.

    Raises:
        ValueError: No folder in it bears the name of a task.
    """
    folders = sorted(path.name for path in Path(dataset_dir).glob("*") if path.is_dir())
    tasks = [glue_task(name) for name in folders if name.split("_", maxsplit=1)[0] in GLUE_TASKS]
    if not tasks:
        raise ValueError(
            f"`dataset_dir` {str(dataset_dir)!r} holds the folders {folders}, expected folders named as GLUE tasks: "
            f"{', '.join(GLUE_TASKS)}"
        )
    return tasks


def load_glue(
    task: GlueTask, dataset_dir: str | Path | None = None, *, splits: Sequence[str] | None = None
) -> DatasetDict:
    """Read and check the rows of a task.

    Args:
        task: The task.
        dataset_dir: Folder with `<task>/<split>.parquet` in the schema of `nyu-mll/glue`. None reads from the Hub.
        splits: What to read; `train` and the validation splits if None.

    Returns:
        One dataset per split, in memory. Every row has its texts and a label in range.

    Raises:
        FileNotFoundError: `dataset_dir` lacks a file.
        ConnectionError: The Hub cannot be reached.
        ValueError: A split is no parquet file, is empty, lacks a column or holds a label out of range.
    """
    splits = splits or ("train", *task.validation_splits)
    if dataset_dir is None:
        data, origin = _from_hub(task, splits), f"{HUB_DATASET}/{task.name}/"
    else:
        folder = Path(dataset_dir) / task.name
        data, origin = {split: _from_parquet(folder / f"{split}.parquet") for split in splits}, f"{folder}/"
    for split, dataset in data.items():
        _check_rows(dataset, task, f"{origin}{split}{'' if dataset_dir is None else '.parquet'}")
    return DatasetDict(data)


def _from_hub(task: GlueTask, splits: Sequence[str]) -> dict[str, Dataset]:
    if task.name not in GLUE_TASKS:
        raise ValueError(f"`task_name` {task.name!r} is not on the Hub: give `dataset_dir`, the folder that holds it")
    try:
        return dict(zip(splits, load_dataset(HUB_DATASET, task.name, split=list(splits)), strict=True))
    except OSError as error:
        raise ConnectionError(
            f"cannot read {HUB_DATASET}/{task.name} from the Hub: check the connection, or give `dataset_dir`, a "
            f"folder with {task.name}/{splits[0]}.parquet ({error})"
        ) from error


def _from_parquet(path: Path) -> Dataset:
    if not path.is_file():
        found = sorted(entry.name for entry in path.parent.glob("*")) or "nothing"
        raise FileNotFoundError(
            f"{path} does not exist, its folder holds {found}: give a `dataset_dir` with this file"
        )
    return Dataset(InMemoryTable(_read_parquet(path, pq.read_table)))


def _read_parquet(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _check_rows(dataset: Dataset, task: GlueTask, source: str) -> None:
    columns = (*task.text_columns, LABEL_COLUMN)
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"{source} lacks the columns {missing}: found {dataset.column_names}, expected {list(columns)}"
        )
    if not len(dataset):
        raise ValueError(f"{source} is empty, expected at least one row")
    table = dataset.data.table
    for column in task.text_columns:
        texts = table.column(column)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)) or texts.null_count:
            raise ValueError(
                f"{source}, column `{column}`: found {texts.type} with {texts.null_count} nulls, "
                "expected a string in every row"
            )
    _check_labels(table.column(LABEL_COLUMN), task, source)


def _check_labels(labels: pa.ChunkedArray, task: GlueTask, source: str) -> None:
    low, high = task.label_range
    kind = "numbers" if task.is_regression else "integers"
    expected = f"expected {kind} from {low} to {high} {task.label_names or ''}".rstrip()
    numeric = pa.types.is_integer(labels.type) or (task.is_regression and pa.types.is_floating(labels.type))
    if not numeric:
        raise ValueError(f"{source}, column `{LABEL_COLUMN}`: found {labels.type}, {expected}")
    values = labels.to_numpy()  # nulls become NaN, which is in no range
    bad = np.flatnonzero(~((values >= low) & (values <= high)))
    if len(bad):
        raise ValueError(
            f"{source}, column `{LABEL_COLUMN}`: found {values[bad[0]]} in row {bad[0]}, {expected}; "
            "the test sets of GLUE have no labels"
        )


def take(dataset: Dataset, max_samples: int | None, *, seed: int | None = None) -> Dataset:
    """Limit the number of rows.

    Args:
        dataset: Rows.
        max_samples: How many to take, at least 1; all if None.
        seed: Shuffles before taking, for training sets, whose order may mean something. None takes the first rows, so
            that every model is evaluated on the same ones.

    Returns:
        The rows taken.

    Raises:
        ValueError: `max_samples` is below 1.
    """
    if max_samples is None:
        return dataset
    if max_samples < 1:
        raise ValueError(f"the number of samples is {max_samples}, expected at least 1")
    rows = dataset if seed is None else dataset.shuffle(seed=seed)
    return rows.select(range(min(max_samples, len(rows))))


def split_off_dev(train: Dataset, *, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a development split from a training set: a tenth of it, at most 2000 rows, drawn at random.

    It ranks choices; it is no estimate of the validation score. Rows of some training sets share sentences (SST-2's
    are phrases of one another), so scores on it are optimistic.

    Args:
        train: Training rows, at least 2.
        seed: Seed of the draw.

    Returns:
        Remaining training rows, and development rows.

    Raises:
        ValueError: There is only one row.
    """
    if len(train) < MIN_ROWS_TO_SPLIT:
        raise ValueError(
            f"the training set has {len(train)} rows, expected at least 2, to cut a development split off"
        )
    num_dev = min(DEV_ROWS, max(1, round(DEV_FRACTION * len(train))))
    parts = train.train_test_split(test_size=num_dev, seed=seed)
    return parts["train"], parts["test"]
