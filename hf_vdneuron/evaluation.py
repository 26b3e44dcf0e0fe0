# SPDX-License-Identifier: Apache-2.0
"""The score of a model, pruned or not, on a GLUE task: rows are encoded for it, and its outputs measured."""

import inspect
import math
from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_vdneuron.glue import LABEL_COLUMN, GlueMetric, GlueTask
from hf_vdneuron.labels import class_order


__all__ = ["encode", "evaluate_glue", "make_compute_metrics", "require_resamples"]

#: Seed of the resampled validation sets, and the fewest that have a spread.
RESAMPLING_SEED, LEAST_RESAMPLES = 0, 2


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
            # A Trainer's labels are in fp32. So are these, whoever calls, as a score is compared to the last digit.
            references = np.asarray(evaluation.label_ids, dtype=np.float32)
            return metric.compute(predictions=logits[:, 0], references=references)
        # Labels of the data set are positions in `order`.
        references = np.argsort(order)[evaluation.label_ids]
        return metric.compute(predictions=logits[:, order].argmax(-1), references=references)

    return compute_metrics


def require_resamples(num_resamples: int | None) -> None:
    """Check how many resampled validation sets are asked for.

    Args:
        num_resamples: Their number; None asks for none.

    Raises:
        ValueError: If they are so few that they have no spread.
    """
    if num_resamples is not None and num_resamples < LEAST_RESAMPLES:
        raise ValueError(f"`num_resamples` is {num_resamples}, expected at least {LEAST_RESAMPLES}")


def evaluate_glue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GlueTask,
    data: Mapping[str, Dataset],
    *,
    max_length: int,
    batch_size: int,
    num_resamples: int | None = None,
) -> dict[str, Any]:
    """Score a model on the validation sets of a task, on the device where the model is.

    Args:
        model: A classifier, put into evaluation mode.
        tokenizer: Its tokenizer.
        task: The task.
        data: Rows of every validation split of the task.
        max_length: Tokens to which texts are truncated.
        batch_size: Examples per forward pass.
        num_resamples: Resampled validation sets for the standard error of `score`, at least 2; None leaves it out. A
            thousand of a few thousand rows take seconds.

    Returns:
        `score`, the mean of the metrics; each metric by name; `num_examples` and `split`. MNLI, which has two
        validation sets, gets the means over both, and `accuracy_matched` and `accuracy_mismatched`. Resampled, there
        is `standard_error` too: how far other rows of as many would have moved `score`.

    Raises:
        ValueError: If `num_resamples` is below 2.
    """
    require_resamples(num_resamples)
    compute_metrics = make_compute_metrics(task, model.config)
    outputs = {}
    for split in task.validation_splits:
        encoded = encode(data[split], task, tokenizer, model.config, max_length=max_length)
        logits = _predict(model, tokenizer, encoded, batch_size=batch_size, description=f"Evaluating {task.name}")
        outputs[split] = logits, np.array(encoded["labels"])

    def measure(rows: Mapping[str, NDArray[np.integer]] | None = None) -> dict[str, float]:
        chosen = {split: slice(None) if rows is None else rows[split] for split in outputs}
        return _merge({
            split: compute_metrics(EvalPrediction(logits[chosen[split]], labels[chosen[split]]))
            for split, (logits, labels) in outputs.items()
        })

    sizes = {split: len(labels) for split, (_, labels) in outputs.items()}
    error = {} if num_resamples is None else {"standard_error": _standard_error(measure, sizes, num_resamples)}
    return {**measure(), **error, "num_examples": sum(sizes.values()), "split": "+".join(outputs)}


def _standard_error(
    measure: Callable[[Mapping[str, NDArray[np.integer]]], Mapping[str, float]],
    sizes: Mapping[str, int],
    num_resamples: int,
) -> float:
    """Estimate by the bootstrap how far a score is from that of all rows of its kind.

    Validation sets are drawn, with replacement, from the one that there is (Efron, "Bootstrap Methods: Another Look at
    the Jackknife", 1979, section 2).

    Returns:
        Standard deviation of the score over them.
    """
    generator = np.random.default_rng(RESAMPLING_SEED)
    draws = ({split: generator.integers(0, size, size) for split, size in sizes.items()} for _ in range(num_resamples))
    return stdev(measure(rows)["score"] for rows in draws)


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
