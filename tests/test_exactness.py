"""What counts as the same output."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_vdneuron.exactness import TOLERANCE, agree, tensors_in


def test_all_tensors_are_found() -> None:
    one, two, three = (torch.full((2,), float(number)) for number in range(3))
    output = BaseModelOutput(last_hidden_state=one, hidden_states=(two, [three]))
    assert [values[0].item() for values in tensors_in(output)] == [0, 1, 2]
    assert list(tensors_in((torch.arange(3), None, "text"))) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        pytest.param(torch.tensor([100.0, 0.5 * TOLERANCE]), True, id="rounding"),
        pytest.param(torch.tensor([100.0, 200 * TOLERANCE]), False, id="difference"),
        pytest.param(torch.tensor([100.0]), False, id="shape"),
        pytest.param(torch.tensor([100.0, torch.nan]), False, id="not a number"),
    ],
)
def test_agreement_is_relative_to_the_largest_value(other: torch.Tensor, expected: bool) -> None:
    assert agree([torch.tensor([100.0, 0.0])], [other]) is expected


def test_fills_hide_nothing() -> None:
    never = torch.finfo(torch.float32).min
    assert agree([torch.tensor([1.0, never])], [torch.tensor([1.0, never])])
    assert not agree([torch.tensor([1.0, never])], [torch.tensor([1.1, never])])
    assert not agree([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, never])])


def test_nothing_agrees_with_nothing() -> None:
    assert agree([torch.zeros(0)], [torch.zeros(0)])
