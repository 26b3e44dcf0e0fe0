"""A dense teacher: whose it is, what it says, how far the student is from it."""

from itertools import product
from pathlib import Path

import pytest
import torch
from runs import tiny_bert
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import BertForTokenClassification
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput
from zoo import zoo_batch, zoo_model

from hf_vdneuron.checkpoints import has_teacher
from hf_vdneuron.distillation import (
    IGNORED_LABEL,
    ProblemType,
    Teacher,
    distillation_loss,
    hidden_state_loss,
    predictions,
    problem_type,
)
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.patching import patch_model_


TEMPERATURE = 2.0


def logits_pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(2, *shape, generator=generator))


def loss_of(student: Tensor, teacher: Tensor, **options: object) -> float:
    return distillation_loss(student, teacher, temperature=TEMPERATURE, **({"labels": None} | options)).item()


def test_classes_are_one_categorical_distribution() -> None:
    student, teacher = logits_pair(5, 3)
    exact = kl_divergence(Categorical(logits=teacher / TEMPERATURE), Categorical(logits=student / TEMPERATURE))
    assert loss_of(student, teacher) == pytest.approx(TEMPERATURE**2 * exact.mean().item(), rel=1e-5)


def test_labels_of_a_multi_label_head_are_a_bernoulli_distribution_each() -> None:
    student, teacher = logits_pair(5, 3)
    exact = kl_divergence(Bernoulli(logits=teacher / TEMPERATURE), Bernoulli(logits=student / TEMPERATURE))
    expected = TEMPERATURE**2 * exact.mean().item()
    assert loss_of(student, teacher, labels=torch.ones(5, 3)) == pytest.approx(expected, rel=1e-5)
    assert loss_of(student, teacher, configured="multi_label_classification") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 1), (5, 3)], ids=["one-output", "several"])
def test_a_regression_is_compared_by_squared_error(shape: tuple[int, int]) -> None:
    student, teacher = logits_pair(*shape)
    expected = (student - teacher).square().mean().item()
    assert loss_of(student, teacher, configured="regression") == pytest.approx(expected)


@pytest.mark.parametrize("labels", [torch.ones(5, 3), torch.zeros(5, dtype=torch.long), None], ids=str)
@pytest.mark.parametrize("extreme", [1.0, 1e4], ids=["ordinary", "extreme"])
def test_the_same_predictions_cost_nothing(labels: Tensor | None, extreme: float) -> None:
    student, teacher = logits_pair(5, 3)
    assert loss_of(extreme * student, extreme * student, labels=labels) == pytest.approx(0, abs=1e-6)
    assert 0 < loss_of(extreme * student, extreme * teacher, labels=labels) < float("inf")


def test_ignored_tokens_do_not_count() -> None:
    student, teacher = logits_pair(2, 4, 3)
    labels = torch.zeros(2, 4, dtype=torch.long)
    labels[0, 1:] = IGNORED_LABEL
    counted = labels != IGNORED_LABEL
    assert loss_of(student, teacher, labels=labels) == pytest.approx(loss_of(student[counted], teacher[counted]))


@pytest.mark.parametrize(
    ("num_labels", "labels", "configured", "expected"),
    [
        pytest.param(1, None, None, ProblemType.REGRESSION, id="one-output"),
        pytest.param(3, torch.zeros(5), None, ProblemType.SINGLE_LABEL, id="other-shape"),
        pytest.param(3, torch.zeros(5, dtype=torch.long), None, ProblemType.SINGLE_LABEL, id="classes"),
        pytest.param(5, torch.zeros(5, 5, dtype=torch.long), None, ProblemType.SINGLE_LABEL, id="integers"),
        pytest.param(3, torch.zeros(5, 3), None, ProblemType.MULTI_LABEL, id="one-number-per-label"),
        pytest.param(3, torch.zeros(5, 3), "regression", ProblemType.REGRESSION, id="config"),
    ],
)
def test_the_problem_is_the_one_that_transformers_sees(
    num_labels: int, labels: Tensor | None, configured: str | None, expected: ProblemType
) -> None:
    assert problem_type(torch.zeros(5, num_labels), labels, configured) is expected


def test_a_teacher_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 4\): expected \(5, 3\).*`distillation_weight=0`"):
        loss_of(torch.zeros(5, 3), torch.zeros(5, 4))


def test_predictions_are_the_logits() -> None:
    logits = torch.zeros(2, 3)
    assert predictions(SequenceClassifierOutput(logits=logits), "model") is logits


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        pytest.param((torch.zeros(()), torch.zeros(2, 3)), "returns tuple", id="tuple"),
        pytest.param(
            QuestionAnsweringModelOutput(start_logits=torch.zeros(2, 3), end_logits=torch.zeros(2, 3)),
            "returns `start_logits`, `end_logits`",
            id="question-answering",
        ),
        pytest.param(torch.zeros(2, 3), "returns Tensor", id="chain"),
    ],
)
def test_outputs_without_logits_are_refused(outputs: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"The model {got}: expected.*`distillation_weight=0`"):
        predictions(outputs, "model")


def test_the_own_teacher_is_the_student_as_it_was_dense_and_fixed() -> None:
    student, teacher = patch_model_(tiny_bert()), Teacher(None)
    assert teacher.model is None
    teacher.copy_(student)
    assert variational_layers(student)
    assert not variational_layers(teacher.model)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    ids = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(teacher.model(ids).logits, student.eval()(ids).logits)
    teacher.forget_own_()
    assert teacher.model is None


def test_the_own_teacher_travels_in_a_checkpoint(tmp_path: Path) -> None:
    student, teacher = patch_model_(tiny_bert()), Teacher(None)
    teacher.copy_(student)
    teacher.save(tmp_path / "new")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    resumed = Teacher(None)
    resumed.load_(tmp_path / "new", student)
    state, expected = resumed.model.state_dict(), teacher.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    resumed.load_(tmp_path, student)  # a checkpoint without one
    assert resumed.model is None


def test_the_users_teacher_stays_and_is_not_copied(tmp_path: Path) -> None:
    given, student = tiny_bert(), patch_model_(tiny_bert())
    teacher = Teacher(given)
    teacher.copy_(student)
    teacher.save(tmp_path)
    assert not has_teacher(tmp_path)
    own = Teacher(None)
    own.copy_(student)
    own.save(tmp_path)
    teacher.load_(tmp_path, student)
    teacher.forget_own_()
    assert teacher.model is given


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("hidden_states", [True, False])
def test_the_teacher_hears_the_inputs_without_the_labels(labelled: bool, hidden_states: bool) -> None:
    model = tiny_bert(BertForTokenClassification).eval()
    ids, labels = torch.ones(2, 3, dtype=torch.long), torch.full((2, 3), IGNORED_LABEL)
    inputs = {"input_ids": ids, "labels": labels} if labelled else {"input_ids": ids}
    outputs = Teacher(model).outputs(inputs, hidden_states=hidden_states)
    assert torch.equal(outputs.logits, model(ids).logits)
    assert "loss" not in outputs
    assert ("hidden_states" in outputs) == hidden_states
    assert not outputs.logits.requires_grad


@pytest.mark.parametrize("row", ["bart", "t5", "whisper"])
def test_the_teacher_of_an_encoder_decoder_writes_after_the_same_words(row: str) -> None:
    model = zoo_model(row)
    lesson = Teacher(zoo_model(row)).outputs(zoo_batch(model), hidden_states=False)
    assert torch.equal(lesson.logits, model(**zoo_batch(model)).logits)


def test_there_is_no_lesson_without_a_teacher() -> None:
    with pytest.raises(RuntimeError, match="no teacher yet"):
        Teacher(None).outputs({}, hidden_states=False)


# Hidden states


def states(num_layers: int, *shape: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_layers, *shape, generator=generator))


@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states_are_compared_at_attended_positions_of_each_layer(padded: bool) -> None:
    student, teacher = states(4, 2, 3, 5, seed=0), states(4, 2, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    shares = []
    for layer, row in product((1, 2, 3), (0, 1)):  # the first one lies in front of all layers
        error = signal = 0.0
        for position in (0,) if padded and row == 1 else (0, 1, 2):
            error += sum((student[layer][row, position, i] - teacher[layer][row, position, i]) ** 2 for i in range(5))
            signal += sum(teacher[layer][row, position, i] ** 2 for i in range(5))
        shares.append(error / signal)
    inputs = {"attention_mask": mask} if padded else {}
    loss = hidden_state_loss({"hidden_states": student}, {"hidden_states": teacher}, inputs)
    torch.testing.assert_close(loss, sum(shares) / 6)


def test_a_student_without_any_signal_misses_all_of_it() -> None:
    teacher = states(3, 2, 3, 5, seed=0)
    silent = tuple(torch.zeros_like(layer) for layer in teacher)
    assert hidden_state_loss({"hidden_states": silent}, {"hidden_states": teacher}, {}).item() == pytest.approx(1)
    assert hidden_state_loss({"hidden_states": teacher}, {"hidden_states": teacher}, {}).item() == 0


def test_both_stacks_of_an_encoder_and_decoder_count() -> None:
    teacher = {
        "encoder_hidden_states": states(3, 2, 4, 5, seed=0),
        "decoder_hidden_states": states(2, 2, 3, 5, seed=1),
    }
    student = {**teacher, "decoder_hidden_states": tuple(torch.zeros(2, 3, 5) for _ in range(2))}
    inputs = {"attention_mask": torch.ones(2, 4), "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert hidden_state_loss(student, teacher, inputs).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (3, 2, 3, 4)], ids=["deeper", "narrower"])
def test_a_teacher_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    student, teacher = states(3, 2, 3, 5, seed=0), states(*shape, seed=0)
    with pytest.raises(ValueError, match=r"expected 3 of shape \(2, 3, 5\).*`hidden_distillation_weight=0`"):
        hidden_state_loss({"hidden_states": student}, {"hidden_states": teacher}, {})


def test_a_model_without_hidden_states_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no hidden states to distil: set `hidden_distillation_weight=0`"):
        hidden_state_loss({"logits": torch.zeros(2)}, {"logits": torch.zeros(2)}, {})
