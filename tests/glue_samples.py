"""Small GLUE tasks, in memory and as files, a tokenizer for their words, and classifiers that read them."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from models import CONFIGS
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_vdneuron.evaluation import evaluate_glue
from hf_vdneuron.glue import GLUE_TASKS, GlueTask


TASKS = [pytest.param(task, id=name) for name, task in GLUE_TASKS.items()]
MAX_LENGTH, BATCH_SIZE = 8, 4
NUM_ROWS = 6
SEED = 11  # of classifiers that give different labels to the rows of every task
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "abcdefghijklmno"  # with the special tokens, as many as the tiny models know


def labels_for(task: GlueTask, num_rows: int = NUM_ROWS) -> list[float]:
    """Labels at both ends of their range and between them."""
    if task.is_regression:
        return [row * 5 / (num_rows - 1) for row in range(num_rows)]
    return [row % task.num_labels for row in range(num_rows)]


def columns_for(task: GlueTask, num_rows: int = NUM_ROWS) -> dict[str, list[Any]]:
    """Rows of different lengths."""
    rng = np.random.default_rng(0)
    texts = {
        column: [" ".join(rng.choice(list(WORDS), size=1 + row % 5)) for row in range(num_rows)]
        for column in task.text_columns
    }
    return {**texts, "label": labels_for(task, num_rows), "idx": list(range(num_rows))}


def rows_of(task: GlueTask) -> dict[str, Dataset]:
    """Rows of each validation split; splits have different sizes."""
    return {split: Dataset.from_dict(columns_for(task, 6 + 3 * i)) for i, split in enumerate(task.validation_splits)}


def write_task(folder: Path, task: GlueTask, **changes: Any) -> Path:
    """Write the validation splits of a task; `changes` replace columns, None drops one."""
    columns = {name: value for name, value in {**columns_for(task), **changes}.items() if value is not None}
    (folder / task.name).mkdir(parents=True, exist_ok=True)
    for split in task.validation_splits:
        pq.write_table(pa.table(columns), folder / task.name / f"{split}.parquet")
    return folder


def tiny_tokenizer() -> BertTokenizer:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    return BertTokenizer(vocab=vocabulary, model_max_length=16)


def config_with(names: Sequence[str]) -> PreTrainedConfig:
    return BertConfig(id2label=dict(enumerate(names)), num_labels=len(names))


@torch.no_grad()
def tiny_classifier(num_labels: int, family: str = "bert", label_names: Sequence[str] = ()) -> PreTrainedModel:
    """A classifier whose predictions depend on the words: its matrices are large, all else is native."""
    config = deepcopy(CONFIGS[family])
    config.num_labels = num_labels
    if label_names:
        config.id2label = dict(enumerate(label_names))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    random = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(generator=random)
    return model


def evaluate(
    model: PreTrainedModel, task: GlueTask, rows: dict[str, Dataset], *, num_resamples: int | None = None
) -> dict[str, Any]:
    sizes = {"max_length": MAX_LENGTH, "batch_size": BATCH_SIZE, "num_resamples": num_resamples}
    return evaluate_glue(model, tiny_tokenizer(), task, rows, **sizes)


def write_sst2(root: Path, *, num_rows: int = 24) -> None:
    """Write a tiny model to `model` and the files of SST-2 to `data`."""
    tiny_classifier(2).base_model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    columns = {name: values for name, values in columns_for(GLUE_TASKS["sst2"], num_rows).items() if name != "idx"}
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    for split in ("train", "validation"):
        (root / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(root / "data" / "sst2" / f"{split}.parquet")
