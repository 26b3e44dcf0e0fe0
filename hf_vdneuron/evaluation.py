# SPDX-License-Identifier: Apache-2.0
"""A classifier, pruned or not, meets a GLUE task: label order, encoding, the score."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_vdneuron.glue import LABEL_COLUMN, GlueMetric, GlueTask
from hf_vdneuron.persistence import from_pretrained


__all__ = [
    "class_order",
    "encode",
    "evaluate_glue",
    "fitting_tasks",
    "load_classifier",
    "load_tokenizer",
    "make_compute_metrics",
    "read_classifier_config",
]

#: What the name of a class with a trained classifier ends with, in transformers.
CLASSIFIER_SUFFIX = "ForSequenceClassification"

#: Tokens, beside special ones, that a tokenizer knows without its files: T5's has a space.
BLANK_TOKENS = 1


def read_classifier_config(model_name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the configuration of a fine-tuned classifier, to see what it is before its weights are loaded.

    Args:
        model_name_or_path: Folder, or name on the Hub.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The configuration.

    Raises:
        ValueError: There is no such model, or it has no trained classifier.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged values trip config classes in all kinds of ways
        raise ValueError(
            f"cannot load `model_name_or_path` {model_name_or_path!r}: give a folder with a saved model, or a name on "
            f"the Hub ({error})"
        ) from error
    saved_classes = config.architectures or []
    if not any(name.endswith(CLASSIFIER_SUFFIX) for name in saved_classes):
        raise ValueError(
            f"`model_name_or_path` {model_name_or_path!r} holds {saved_classes}, expected a class ending in "
            f"{CLASSIFIER_SUFFIX}: fine-tune it on the task first"
        )
    return config


def load_classifier(
    model_name_or_path: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fine-tuned classifier, pruned or not, and its tokenizer.

    Args:
        model_name_or_path: Folder, or name on the Hub.
        trust_remote_code: Load with transformers alone, and run the code that comes with the model.

    Returns:
        The model on the CPU, and the tokenizer.

    Raises:
        ValueError: There is no such model or tokenizer, or it is damaged.
    """
    tokenizer = load_tokenizer(model_name_or_path, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        return from_pretrained(model_name_or_path), tokenizer
    try:
        model = AutoModelForSequenceClassification.from_pretrained(model_name_or_path, trust_remote_code=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load `model_name_or_path` {model_name_or_path!r}: save or download it again ({error})"
        ) from error
    return model, tokenizer


def load_tokenizer(model_name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a model.

    Args:
        model_name_or_path: Folder, or name on the Hub.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    advice = f"cannot load the tokenizer of `model_name_or_path` {model_name_or_path!r}: save it beside the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged or missing files trip tokenizer classes in all kinds of ways
        raise ValueError(f"{advice} ({error})") from error
    # Where no files are, many tokenizer classes come up blank instead of failing: every word would be unknown.
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) <= BLANK_TOKENS:
        raise ValueError(f"{advice} (found no vocabulary)")
    return tokenizer


def fitting_tasks(config: PreTrainedConfig, tasks: Sequence[GlueTask]) -> list[GlueTask]:
    """Choose the tasks for which a model has the right number of labels.

    Args:
        config: Configuration of the model.
        tasks: Tasks, at least one.

    Returns:
        Those that fit, at least one.

    Raises:
        ValueError: None fits.
    """
    fitting = [task for task in tasks if task.num_labels == config.num_labels]
    if not fitting:
        raise ValueError("; ".join(_misfit(config, task) for task in tasks))
    return fitting


def _misfit(config: PreTrainedConfig, task: GlueTask) -> str:
    needed = f"{task.num_labels} {task.label_names or '(regression)'}"
    return (
        f"{task.name} needs a model with {needed} labels, got one with {config.num_labels}: fine-tune it on the task"
    )


def class_order(config: PreTrainedConfig, task: GlueTask) -> tuple[int, ...]:
    """Match the outputs of a model to the labels of a task, by name where the model knows the names.

    Args:
        config: Configuration of a model.
        task: The task.

    Returns:
        The model's output for each label of the task, a permutation of `range(num_labels)`. The identity if the
        model's label names are others, such as transformers' own `LABEL_0`.

    Raises:
        ValueError: The model has another number of labels.
    """
    if config.num_labels != task.num_labels:
        raise ValueError(_misfit(config, task))
    outputs = {_normalized(name): int(output) for output, name in (config.id2label or {}).items()}
    if set(outputs) != set(task.label_names):
        return tuple(range(task.num_labels))
    return tuple(outputs[name] for name in task.label_names)


def _normalized(label_name: str) -> str:
    return label_name.lower().replace(" ", "_").replace("-", "_")


def encode(
    dataset: Dataset, task: GlueTask, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, max_length: int
) -> Dataset:
    """Tokenise rows for a model; batches are padded later, by transformers' `DataCollatorWithPadding`.

    Args:
        dataset: Rows of the task.
        task: The task.
        tokenizer: Tokenizer of the model.
        config: Configuration of the model.
        max_length: Tokens to which texts, pairs included, are truncated.

    Returns:
        The columns that the tokenizer makes, and `labels` as the model numbers them.

    Raises:
        ValueError: The model reads fewer tokens, or has another number of labels.
    """
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    if max_length > longest:
        raise ValueError(f"`max_length` is {max_length}, but the model reads at most {longest} tokens")
    order = class_order(config, task)

    def encode_batch(batch: dict[str, list[Any]]) -> BatchEncoding:
        texts = [batch[column] for column in task.text_columns]
        encoding = tokenizer(*texts, truncation=True, max_length=max_length)
        labels = batch[LABEL_COLUMN]
        encoding["labels"] = list(map(float, labels)) if task.is_regression else [order[label] for label in labels]
        return encoding

    return dataset.map(encode_batch, batched=True, remove_columns=dataset.column_names, desc=f"Tokenising {task.name}")


def make_compute_metrics(task: GlueTask, config: PreTrainedConfig) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the `compute_metrics` of a Trainer.

    Args:
        task: The task.
        config: Configuration of the model, as the rows were encoded with.

    Returns:
        A function from logits, shape `(num_examples, num_labels)`, and encoded labels, shape `(num_examples,)`, to
        `score` and each metric. It raises a ValueError if a logit is not finite.
    """
    metric = GlueMetric(task.name, keep_in_memory=True)
    order = np.array(class_order(config, task))

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        # A model that also returns hidden states or a cache gives a tuple.
        predictions = evaluation.predictions
        logits: NDArray[np.floating] = predictions[0] if isinstance(predictions, tuple) else predictions
        if not np.isfinite(logits).all():
            raise ValueError(f"the model's outputs for {task.name} hold NaN or infinity: it diverged, or is damaged")
        if task.is_regression:
            return metric.compute(predictions=logits[:, 0], references=evaluation.label_ids)
        # Labels of the data set are positions in `order`.
        references = np.argsort(order)[evaluation.label_ids]
        return metric.compute(predictions=logits[:, order].argmax(-1), references=references)

    return compute_metrics


def evaluate_glue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GlueTask,
    data: Mapping[str, Dataset],
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, Any]:
    """Score a model on the validation sets of a task, on the device where the model is.

    Args:
        model: A classifier, put into evaluation mode.
        tokenizer: Its tokenizer.
        task: The task.
        data: Rows of every validation split of the task.
        max_length: Tokens to which texts are truncated.
        batch_size: Examples per forward pass.

    Returns:
        `score`, the mean of the metrics; each metric by name; `num_examples` and `split`. MNLI, which has two
        validation sets, gets the means over both, and `accuracy_matched` and `accuracy_mismatched`.
    """
    compute_metrics = make_compute_metrics(task, model.config)
    per_split = {}
    for split in task.validation_splits:
        encoded = encode(data[split], task, tokenizer, model.config, max_length=max_length)
        logits = _predict(model, tokenizer, encoded, batch_size=batch_size, description=f"Evaluating {task.name}")
        per_split[split] = compute_metrics(EvalPrediction(logits, np.array(encoded["labels"])))
    return {
        **_merge(per_split),
        "num_examples": sum(len(data[split]) for split in per_split),
        "split": "+".join(per_split),
    }


def _merge(per_split: dict[str, dict[str, float]]) -> dict[str, float]:
    """Average metrics over splits, and keep each split's own under the split's suffix."""
    names = next(iter(per_split.values()))
    merged = {name: fmean(metrics[name] for metrics in per_split.values()) for name in names}
    if len(per_split) > 1:
        for split, metrics in per_split.items():
            suffix = split.removeprefix("validation")
            merged |= {f"{name}{suffix}": value for name, value in metrics.items() if name != "score"}
    return merged


@torch.inference_mode()
def _predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Dataset,
    *,
    batch_size: int,
    description: str,
) -> NDArray[np.floating]:
    """Compute logits in fp32, shape `(num_examples, num_labels)`, in the order of the rows."""
    model.eval()
    # Some tokenizers make columns that their model does not take, such as DistilBERT's token types.
    columns = set(encoded.column_names) & set(inspect.signature(model.forward).parameters) - {"labels"}
    inputs = encoded.select_columns(sorted(columns))
    loader = DataLoader(inputs, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
    logits = [model(**batch.to(model.device)).logits.float().cpu() for batch in tqdm(loader, desc=description)]
    return torch.cat(logits).numpy()
