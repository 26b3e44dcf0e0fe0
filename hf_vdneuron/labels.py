# SPDX-License-Identifier: Apache-2.0
"""Which output of a model stands for which label of a task: matched by name where the model knows the names."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from hf_vdneuron.glue import GlueTask


__all__ = ["class_order", "fitting_tasks", "named_outputs", "needed_labels"]


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
    return (
        f"{task.name} needs a model with {needed_labels(task)} labels, got one with {config.num_labels}: fine-tune it "
        "on the task"
    )


def needed_labels(task: GlueTask) -> str:
    """Say how many labels a model for a task needs, and which.

    Args:
        task: The task.

    Returns:
        Text for an error message.
    """
    return f"{task.num_labels} {task.label_names or '(regression)'}"


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
    return named_outputs(config, task) or tuple(range(task.num_labels))


def named_outputs(config: PreTrainedConfig, task: GlueTask) -> tuple[int, ...] | None:
    """Find a model's output for each label of a task by name.

    Args:
        config: Configuration of the model.
        task: The task.

    Returns:
        The outputs in the order of the task's labels; None if the model's label names are others.
    """
    outputs = {_normalized(name): int(output) for output, name in (config.id2label or {}).items()}
    names = [_normalized(name) for name in task.label_names]
    return tuple(outputs[name] for name in names) if sorted(outputs) == sorted(names) else None


def _normalized(label_name: str) -> str:
    return label_name.lower().replace(" ", "_").replace("-", "_")
