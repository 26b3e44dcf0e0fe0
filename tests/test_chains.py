"""Plain chains: which layers hold neurons or channels, who reads them, what cannot be a chain."""

from collections.abc import Callable

import pytest
import torch
from models import CHAINS
from torch import Tensor, nn

from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.sublayers import Axis, Role, SideName, Slice, Unit


@pytest.mark.parametrize("name", CHAINS)
def test_every_layer_but_the_last_is_found(name: str) -> None:
    chain = CHAINS[name]
    sublayers = find_chain_sublayers(chain.build())
    assert [sublayer.path for sublayer in sublayers] == list(chain.places)
    assert [sublayer.path for sublayer in sublayers if not sublayer.foldable] == list(chain.unfoldable)
    for sublayer, place in zip(sublayers, chain.places.values(), strict=True):
        assert (sublayer.unit, sublayer.num_units) == (Unit.NEURON, place.num_units)
        assert [side.name for side in sublayer.sides] == [SideName.IN, SideName.OUT]
        assert sublayer.sides[0].slices == (Slice(place.rows, Role.INTERMEDIATE, Axis.OUT),)
        assert sublayer.sides[1].slices == (Slice(place.columns, Role.OUTPUT, Axis.IN, place.num_columns),)


@pytest.mark.parametrize("name", CHAINS)
def test_forward_runs_as_the_chain_is_written(name: str) -> None:
    chain = CHAINS[name]
    assert torch.isfinite(chain.model()(chain.inputs())).all()


def test_batch_norms_go_with_their_channels() -> None:
    sublayers = find_chain_sublayers(CHAINS["nested"].build())
    norms = [[part.module for part in sublayer.companions] for sublayer in sublayers]
    assert norms == [["0.1"], [], ["2.2"]]
    assert {part.role for sublayer in sublayers for part in sublayer.companions} == {Role.NORM}
    assert [sublayer.activations for sublayer in sublayers] == [("0.1", "0.2"), ("1.0.1",), ("2.2", "2.3")]


def test_one_layer_has_nothing_to_remove() -> None:
    assert find_chain_sublayers(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Tanh())) == []


def test_norm_before_the_first_layer_belongs_to_no_unit() -> None:
    (sublayer,) = find_chain_sublayers(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 1)))
    assert sublayer.companions == ()


class Competing(nn.ReLU):
    """Looks like an elementwise activation, and is none."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.softmax(-1)


class Doubled(nn.Linear):
    """A layer that may compute something else."""


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(nn.LayerNorm(4), id="layer_norm"),
        pytest.param(nn.Softmax(-1), id="softmax"),
        pytest.param(nn.PReLU(), id="prelu"),
        pytest.param(nn.GroupNorm(2, 4), id="group_norm"),
        pytest.param(nn.ConvTranspose1d(4, 4, 1), id="transposed_convolution"),
        pytest.param(nn.Conv1d(4, 4, 1, groups=2), id="grouped_convolution"),
        pytest.param(nn.ZeroPad2d(1), id="padding"),
        pytest.param(nn.ModuleList([nn.ReLU()]), id="module_list"),
        pytest.param(Doubled(4, 4), id="subclass"),
        pytest.param(Competing(), id="subclass_of_an_activation"),
    ],
)
def test_what_may_mix_features_is_refused_by_name(module: nn.Module) -> None:
    chain = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), module), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"`1\.1`"):
        find_chain_sublayers(chain)


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(lambda: (nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)), id="no_multiple"),
        pytest.param(lambda: (nn.Linear(3, 4), nn.ReLU(), nn.Linear(2, 2)), id="fewer"),
        pytest.param(lambda: (nn.Linear(3, 4), nn.ReLU(), nn.Linear(8, 2)), id="multiple_of_neurons"),
        # The tokens' neurons lie token by token, so a unit's inputs are not one behind another.
        pytest.param(lambda: (nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2)), id="flattened_tokens"),
        pytest.param(lambda: (nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(8, 2, 1)), id="multiple_of_channels"),
        # A linear layer acts on the last axis, which holds positions until the map is flattened.
        pytest.param(lambda: (nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Linear(8, 2)), id="map_not_flattened"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(chain: Callable[[], tuple[nn.Module, ...]]) -> None:
    with pytest.raises(ValueError, match=r"`2`.*`0`"):
        find_chain_sublayers(nn.Sequential(*chain()))


@pytest.mark.parametrize(
    "chain",
    [
        # Over (batch, neurons) it pools neighbouring neurons.
        pytest.param(lambda: (nn.Linear(3, 8), nn.MaxPool1d(2), nn.Linear(8, 2)), id="pooling_of_neurons"),
        pytest.param(
            lambda: (nn.Conv1d(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 2)), id="norm_of_positions"
        ),
        pytest.param(lambda: (nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 2)), id="flattened_positions_only"),
    ],
)
def test_what_mixes_features_where_it_stands_is_refused(chain: Callable[[], tuple[nn.Module, ...]]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"`[12]`"):
        find_chain_sublayers(nn.Sequential(*chain()))


def test_layer_that_runs_twice_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises((TypeError, ValueError), match=r"`[24]`"):
        find_chain_sublayers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer, nn.ReLU(), layer, nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("between", "reader", "foldable"),
    [
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3), True, id="valid"),
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3, padding="valid"), True, id="valid_by_name"),
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3, padding=(0, 1)), False, id="zero_padded"),
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3, padding="same"), False, id="same"),
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), True, id="reflected"),
        pytest.param(nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False), False, id="reader_without_bias"),
        pytest.param(nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 2, 1), False, id="padded_average"),
        pytest.param(nn.AvgPool2d(2, padding=(0, 1)), nn.Conv2d(4, 2, 1), False, id="average_padded_on_one_axis"),
        pytest.param(
            nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Conv2d(4, 2, 1), True, id="padding_not_counted"
        ),
        pytest.param(nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(4, 2, 1), False, id="average_by_another_count"),
        pytest.param(nn.MaxPool2d(3, padding=1), nn.Conv2d(4, 2, 1), True, id="padded_maximum"),
        # Without running statistics evaluation normalises by the batch, and nobody can say what the constant is.
        pytest.param(
            nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1), False, id="norm_without_statistics"
        ),
    ],
)
def test_foldable_where_a_constant_stays_one(between: nn.Module, reader: nn.Module, foldable: bool) -> None:
    (sublayer,) = find_chain_sublayers(nn.Sequential(nn.Conv2d(3, 4, 3), between, reader))
    assert sublayer.foldable is foldable


def test_padding_before_the_first_layer_is_no_matter() -> None:
    chain = nn.Sequential(nn.AvgPool2d(2, padding=1), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert find_chain_sublayers(chain)[0].foldable
