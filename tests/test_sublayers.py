"""Slices name the features of a unit; sub-layers put their slices in order."""

import pytest
import torch

from hf_vdneuron.sublayers import Axis, Role, Side, SideName, Slice, Sublayer, Unit


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        pytest.param(Slice("m", Role.INTERMEDIATE, Axis.OUT), [[3], [0], [2]], id="neurons"),
        pytest.param(Slice("m", Role.VALUE, Axis.OUT, 2), [[6, 7], [0, 1], [4, 5]], id="packed_heads"),
        pytest.param(
            Slice("m", Role.VALUE, Axis.OUT, 2, stride=6, offset=4), [[22, 23], [4, 5], [16, 17]], id="interleaved"
        ),
        pytest.param(
            Slice("m", Role.KEY, Axis.OUT, 2, offset=8), [[14, 15], [8, 9], [12, 13]], id="behind_one_another"
        ),
    ],
)
def test_features_of_units_in_their_order(part: Slice, expected: list[list[int]]) -> None:
    assert part.features(torch.tensor([3, 0, 2])).tolist() == expected


def test_no_units_own_no_features() -> None:
    features = Slice("m", Role.VALUE, Axis.OUT, 4).features(torch.arange(0))
    assert features.shape == (0, 4)
    assert features.dtype == torch.long


def test_sublayer_lists_sides_before_companions() -> None:
    value, columns = Slice("v", Role.VALUE, Axis.OUT, 2), Slice("o", Role.ATTENTION_OUTPUT, Axis.IN, 2)
    query, norm = Slice("q", Role.QUERY, Axis.OUT, 2), Slice("n", Role.NORM, Axis.OUT)
    sides = (Side(SideName.IN, (value,)), Side(SideName.OUT, (columns,)))
    sublayer = Sublayer("attention", Unit.HEAD, 3, sides, companions=(query, norm))
    assert sublayer.slices == (value, columns, query, norm)
    assert sublayer.matrices == (value, columns, query)
    assert sublayer.out_side.name is SideName.OUT


@pytest.mark.parametrize(
    ("part", "num_features", "expected"),
    [
        pytest.param(Slice("m", Role.OUTPUT, Axis.IN), 3, [5, 6, 7], id="packed"),
        pytest.param(Slice("m", Role.VALUE, Axis.OUT, size=2), 6, [5, 5, 6, 6, 7, 7], id="heads"),
        pytest.param(Slice("m", Role.KEY, Axis.OUT, size=1, stride=2, offset=1), 7, [0, 5, 0, 6, 0, 7, 0], id="fused"),
    ],
)
def test_values_of_units_spread_over_their_features(part: Slice, num_features: int, expected: list[int]) -> None:
    values = torch.tensor([5.0, 6.0, 7.0], requires_grad=True)
    spread = part.spread(values, num_features, elsewhere=0)
    assert spread.tolist() == expected
    spread.sum().backward()
    assert values.grad.tolist() == [part.size] * 3
    rows = part.spread(torch.stack([values, -values]), num_features, elsewhere=0)
    assert torch.equal(rows, torch.stack([spread, -spread]))
