"""Dependence in a model whose structure is known: rows, readers and what ends them."""

import pytest
import torch
from models import HEAD_SIZE, NEURONS, batch, tiny_model
from zoo import zoo_batch, zoo_model

from hf_vdneuron.dependence import Dependence, randomised_twin


LAYER = "encoder.layer.1"
MAKER, READER = f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
VALUE, HEAD_READER = f"{LAYER}.attention.self.value", f"{LAYER}.attention.output.dense"


@pytest.fixture
def bert() -> Dependence:
    return Dependence(randomised_twin(tiny_model("bert")), batch())


def test_twin_has_no_accidental_zeros_and_leaves_the_model_alone() -> None:
    model = tiny_model("bert").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = randomised_twin(model)
    assert all(value.ne(0).all() and value.requires_grad for value in twin.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("neuron", [0, 3, NEURONS - 1])
def test_neuron_depends_on_its_row(bert: Dependence, neuron: int) -> None:
    assert bert.rows(READER, neuron) == {f"{MAKER}.weight": (neuron,)}


@pytest.mark.parametrize("feature", [0, HEAD_SIZE + 1])
def test_feature_of_a_head_depends_on_its_value_and_on_all_queries_and_keys_of_the_head(
    bert: Dependence, feature: int
) -> None:
    start = feature // HEAD_SIZE * HEAD_SIZE
    block = tuple(range(start, start + HEAD_SIZE))
    attention = f"{LAYER}.attention.self"
    assert bert.rows(HEAD_READER, feature) == {
        f"{attention}.query.weight": block,
        f"{attention}.key.weight": block,
        f"{attention}.value.weight": (feature,),
    }


@pytest.mark.parametrize("reader", [MAKER, VALUE])
def test_what_a_norm_gives_depends_on_no_row_in_particular(bert: Dependence, reader: str) -> None:
    assert bert.rows(reader, 0) == {}


def test_only_one_layer_reads_neurons_and_many_read_what_it_makes(bert: Dependence) -> None:
    assert not bert.is_read_elsewhere(READER, [f"{MAKER}.weight"])
    assert bert.is_read_elsewhere(VALUE, ["embeddings.word_embeddings.weight"])


def test_rows_end_what_is_made_of_them_alone(bert: Dependence) -> None:
    every = torch.arange(NEURONS)
    assert bert.is_ended_by(READER, MAKER, every)
    assert not bert.is_ended_by(READER, MAKER, every[1:])
    assert not bert.is_ended_by(VALUE, "encoder.layer.0.output.dense", torch.arange(bert.num_features(VALUE)))


def test_what_is_added_to_a_residual_stream_does_not_end_with_its_row() -> None:
    """A channel of the last block is the only row that the classifier's input depends on, and still not all of it."""
    model = zoo_model("resnet_basic")
    resnet = Dependence(randomised_twin(model), zoo_batch(model))
    maker = "resnet.encoder.stages.1.layers.1.layer.1.convolution"
    assert resnet.rows("classifier.1", 3)[f"{maker}.weight"] == (3,)
    assert not resnet.is_ended_by("classifier.1", maker, torch.arange(resnet.num_features("classifier.1")))


def test_positions_are_counted_where_a_layer_reads() -> None:
    model = zoo_model("resnet_basic")
    resnet = Dependence(randomised_twin(model), {"pixel_values": torch.ones(2, 3, 32, 32)})
    assert resnet.num_positions("resnet.embedder.embedder.convolution") == 2 * 32 * 32
    assert resnet.num_positions("resnet.encoder.stages.1.layers.1.layer.0.convolution") == 2 * 4 * 4
