"""Labels of a task are matched to the outputs of a model by name, where the model knows the names."""

import pytest
from glue_samples import TASKS, config_with

from hf_vdneuron.glue import GLUE_TASKS, GlueTask
from hf_vdneuron.labels import class_order, fitting_tasks


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["so-so", "glad"], (1, 0), id="normalised"),
        pytest.param(["Glad", "So So"], (0, 1), id="same"),
        pytest.param(["glad", "Glad"], (0, 1), id="ambiguous"),
    ],
)
def test_own_label_names_are_normalised_too(names: list[str], expected: tuple[int, ...]) -> None:
    assert (
        class_order(config_with(names), GlueTask("moods", ("sentence",), ("Glad", "So So"), ("accuracy",))) == expected
    )


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
