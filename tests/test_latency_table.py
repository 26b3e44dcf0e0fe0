"""A latency table: exact where it was measured, a sum in between, monotone whatever the clock says."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import pytest
import torch
from models import HEADS, LAYERS, NEURONS, tiny_model
from torch import nn
from zoo import zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs, body_cost, unit_counts
from hf_vdneuron.latency import device_name, text_inputs
from hf_vdneuron.latency_table import LatencyTable, measure_latency_table
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.sublayers import Unit


TABLE = LatencyTable(
    batch_size=1,
    length=6,
    device="cpu (here)",
    dtype="torch.float32",
    dense=1.0,
    empty=0.1,
    units={Unit.HEAD: [1, HEADS], Unit.NEURON: [2, NEURONS]},
    seconds={Unit.HEAD: [0.2, 0.5], Unit.NEURON: [0.3, 0.6]},
)


def keep_all() -> dict[str, int]:
    return unit_counts(find_sublayers(tiny_model("bert")), RelevanceMask({}))


def test_a_table_is_exact_at_both_ends() -> None:
    sublayers = find_sublayers(tiny_model("bert"))
    assert TABLE.predict(sublayers, {}) == pytest.approx(1.0)
    assert TABLE.predict(sublayers, dict.fromkeys(keep_all(), 0)) == pytest.approx(0.1)


def test_a_layer_adds_its_part_of_what_was_timed() -> None:
    sublayers = find_sublayers(tiny_model("bert"))
    none = dict.fromkeys(keep_all(), 0)
    head, neuron = sublayers[0].path, sublayers[1].path
    # The parts add up to 0.4 + 0.5, as the complete model does beyond the empty one: nothing is rescaled.
    assert TABLE.predict(sublayers, {**none, head: 1}) == pytest.approx(0.1 + 0.1 / LAYERS)
    assert TABLE.predict(sublayers, {**none, neuron: 1}) == pytest.approx(0.1 + 0.1 / LAYERS)
    between = (2 + NEURONS) / 2
    assert TABLE.predict(sublayers, {**none, neuron: between}) == pytest.approx(0.1 + 0.35 / LAYERS)


def test_a_table_survives_json() -> None:
    assert LatencyTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "patched"])
def test_measuring_times_smaller_and_smaller_models(monkeypatch: pytest.MonkeyPatch, patched: bool) -> None:
    """With a clock that counts multiply-accumulates and runs ever slower, the table gives the model's own."""
    slowdown = count(1)

    def by_macs(models: Mapping[str, nn.Module], inputs: object) -> dict[str, float]:
        factor = next(slowdown)
        return {name: factor * (1000 + body_cost(model, length=6).macs) for name, model in models.items()}

    monkeypatch.setattr("hf_vdneuron.latency_table.measure_latency", by_macs)
    model = tiny_model("bert")
    sublayers = find_sublayers(model)
    complete = 1000 + body_cost(model, length=6).macs
    if patched:
        patch_model_(model)
    table = measure_latency_table(model, text_inputs(batch_size=2, length=6))
    assert (table.batch_size, table.length) == (2, 6)
    for kept in (0, 1, 2):
        counts = {part.path: min(kept, part.num_units) for part in sublayers}
        expected = 1000 + Costs(model, length=6).macs(counts)
        assert table.predict(sublayers, counts) / table.dense == pytest.approx(expected / complete)


def test_a_clock_that_errs_does_not_make_more_units_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 5.0, 2.0, 8.0, 9.0, 10.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(
        "hf_vdneuron.latency_table.measure_latency", lambda *_: {"complete": 10.0, "smaller": next(times)}
    )
    table = measure_latency_table(tiny_model("bert"), text_inputs(batch_size=1, length=6))
    for seconds in table.seconds.values():
        assert seconds == sorted(seconds)
        assert seconds[0] >= table.empty


def test_units_that_take_no_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vdneuron.latency_table.measure_latency", lambda *_: {"complete": 1.0, "smaller": 1.0})
    with pytest.raises(ValueError, match=r"take no time that can be measured here: .* Raise `latency_batch_size`"):
        measure_latency_table(tiny_model("bert"), text_inputs(batch_size=1, length=6))


def test_a_table_can_be_measured() -> None:
    table = measure_latency_table(tiny_model("distilbert"), text_inputs(batch_size=1, length=6))
    assert 0 < table.empty < table.dense
    assert table.units[Unit.NEURON][-1] == NEURONS


def test_a_table_is_of_what_it_was_measured_on() -> None:
    model = tiny_model("bert").float()
    table = replace(TABLE, device=device_name(model.device))
    assert table.is_of(model, batch_size=1, length=6)
    assert not table.is_of(model, batch_size=2, length=6)
    assert not table.is_of(model, batch_size=1, length=5)
    assert not table.is_of(model.bfloat16(), batch_size=1, length=6)
    assert not TABLE.is_of(model.float(), batch_size=1, length=6)


def test_blocks_that_cannot_run_empty_are_timed_with_what_they_need() -> None:
    table = measure_latency_table(zoo_model("resnet_basic"), {"pixel_values": torch.ones(1, 3, 32, 32)})
    assert table.units[Unit.NEURON][-1] == 16
