# SPDX-License-Identifier: Apache-2.0
"""The one door by which a model, pruned or not, and its tokenizer come into a script: all there, or a clear error."""

import reprlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_vdneuron.glue import GlueTask
from hf_vdneuron.labels import named_outputs, needed_labels
from hf_vdneuron.persistence import from_pretrained


__all__ = ["load_classifier", "load_language_model", "load_model", "load_tokenizer", "read_classifier_config"]

#: What the name of a class with a trained classifier ends with, in transformers.
CLASSIFIER_SUFFIX = "ForSequenceClassification"

#: Tokens, beside special ones, that a tokenizer knows without its files: T5's has a space.
BLANK_TOKENS = 1

#: Part of a base model that some checkpoints lack, as pretraining did without it.
POOLER = "pooler"


@contextmanager
def _loading(what: str, advice: str) -> Generator[None]:
    """Load without transformers' report and bar, so that an error stands alone."""
    verbosity, shows_bars, shows_downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if shows_downloads:
        enable_progress_bars()
    try:
        yield
    except Exception as error:  # damaged files trip transformers in all kinds of ways
        raise ValueError(f"cannot load {what}: {advice} ({error})") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _flag(model_name_or_path: str) -> str:
    return f"`model_name_or_path` {model_name_or_path!r}"


def _read_config(model_name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    with _loading(_flag(model_name_or_path), "give a folder with a saved model, or a name on the Hub"):
        path = Path(model_name_or_path)
        if path.is_absolute() and not path.is_dir():  # as a name it would be wrong in other ways
            raise FileNotFoundError("there is no such folder")
        return AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)


def _has_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith(CLASSIFIER_SUFFIX) for name in config.architectures or [])


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
    config = _read_config(model_name_or_path, trust_remote_code=trust_remote_code)
    if not _has_classifier(config):
        raise ValueError(
            f"{_flag(model_name_or_path)} holds {config.architectures or []}, expected a class ending "
            f"in {CLASSIFIER_SUFFIX}: fine-tune it on the task first"
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
    door: Callable[..., Any] = from_pretrained
    options = {}
    if trust_remote_code:
        door = AutoModelForSequenceClassification.from_pretrained
        options = {"trust_remote_code": True, "use_safetensors": True}
    return _load_weights(model_name_or_path, door, options, is_trained=True), tokenizer


def load_model(model_name_or_path: str, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to fine-tune on a task, pruned or not, and its tokenizer. Code of the model's own never runs.

    Args:
        model_name_or_path: Folder, or name on the Hub.
        task: The task, which names the labels. A classifier that knows these names keeps its own order of them.

    Returns:
        The model in fp32 on the CPU, with a classifier for the task, and the tokenizer.

    Raises:
        ValueError: There is no such model or tokenizer, it is damaged, or a classifier for other labels.
    """
    config = _read_config(model_name_or_path)
    has_classifier = _has_classifier(config)
    if has_classifier and config.num_labels != task.num_labels:
        raise ValueError(
            f"{_flag(model_name_or_path)} is a classifier with {config.num_labels} labels, but "
            f"{task.name} needs {needed_labels(task)}: start from the model without its classifier, or from another"
        )
    if named_outputs(config, task) is None:
        labels = dict(enumerate(task.label_names)) or {0: "score"}
        config.id2label, config.label2id = labels, {label: index for index, label in labels.items()}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    tokenizer = load_tokenizer(model_name_or_path)
    options = {"model_class": AutoModelForSequenceClassification, "config": config, "dtype": torch.float32}
    return _load_weights(model_name_or_path, from_pretrained, options, is_trained=has_classifier), tokenizer


def load_language_model(model_name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, pruned or not, and its tokenizer. Code of the model's own never runs.

    Args:
        model_name_or_path: Folder, or name on the Hub.

    Returns:
        The model in fp32 on the CPU, and the tokenizer.

    Raises:
        ValueError: There is no such model or tokenizer, it is damaged, or it has no trained head.
    """
    _read_config(model_name_or_path)
    tokenizer = load_tokenizer(model_name_or_path)
    options = {"model_class": AutoModelForCausalLM, "dtype": torch.float32}
    return _load_weights(model_name_or_path, from_pretrained, options, is_trained=True), tokenizer


def _load_weights(
    model_name_or_path: str, door: Callable[..., Any], options: dict[str, Any], *, is_trained: bool
) -> PreTrainedModel:
    """Load weights; where the head is not trained, it and the pooler below it may start at random."""
    with _loading(_flag(model_name_or_path), "save or download it again"):
        model, info = door(model_name_or_path, output_loading_info=True, **options)
        body = f"{model.base_model_prefix}."
        if lost := sorted(
            key for key in info["missing_keys"] if is_trained or (key.startswith(body) and POOLER not in key)
        ):
            raise ValueError(f"its files lack the weights {reprlib.repr(lost)}")
    return model


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
    with _loading(f"the tokenizer of {_flag(model_name_or_path)}", "save it beside the model"):
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
        # Where no files are, many tokenizer classes come up blank instead of failing: every word would be unknown.
        if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) <= BLANK_TOKENS:
            raise ValueError("found no vocabulary")
    return tokenizer
