"""Casts that stop at float32."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_vdneuron.precision import at_least_float32, with_range_of_float32


FINE = torch.tensor([1 + 2.0**-20], dtype=torch.float32)  # bfloat16 would round it to 1


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        pytest.param(Tensor.bfloat16, torch.float32, id="bfloat16"),
        pytest.param(Tensor.half, torch.float32, id="float16"),
        pytest.param(Tensor.double, torch.float64, id="float64"),
        pytest.param(lambda tensor: tensor, torch.float32, id="nothing"),
    ],
)
def test_no_digit_is_lost(convert: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    converted = at_least_float32(convert)(FINE)
    assert converted.dtype is dtype
    assert converted.item() == FINE.item()


def test_float64_may_come_down_to_float32() -> None:
    assert at_least_float32(Tensor.half)(FINE.double()).dtype is torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_moves_go_through(dtype: torch.dtype | None) -> None:
    moved = at_least_float32(lambda tensor: tensor.to("meta", dtype))(FINE)
    assert (moved.device.type, moved.dtype) == ("meta", torch.float32)


def test_integers_are_left_alone() -> None:
    integers = torch.arange(3)
    assert at_least_float32(lambda tensor: tensor)(integers) is integers


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        pytest.param(torch.float16, torch.float32, id="float16"),
        pytest.param(torch.float8_e5m2, torch.float32, id="float8"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.float64, torch.float64, id="float64"),
    ],
)
def test_squares_of_activations_fit(dtype: torch.dtype, expected: torch.dtype) -> None:
    wide = with_range_of_float32(dtype)
    assert wide is expected
    assert torch.tensor(1e-15).to(wide).square() > 0
    assert torch.tensor(1e15).to(wide).square() < math.inf
