"""What units are worth: half the curvature of what reads them, less what the prior charges."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import rows, tiny_bert
from torch import Tensor, nn
from zoo import zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.curvature import estimate_curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.evidence import unit_evidence
from hf_vdneuron.laplace import fit_posterior_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import unit_relevance


#: So many examples that the prior has no say.
MANY = 1e12


def data() -> list[dict[str, Tensor]]:
    columns = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    return [columns]


def test_where_the_prior_has_no_say_a_unit_is_worth_half_its_curvature() -> None:
    model = patch_model_(tiny_bert())
    curvature = estimate_curvature(model, data())
    for sublayer in find_sublayers(model):
        worth = unit_evidence(model, curvature, num_data=MANY)[sublayer.path]
        scores = curvature.scores[sublayer.out_side.slices[0].module]
        expected = torch.stack([sum(score**2 for score in column) / len(column) / 2 for column in scores.t()])
        torch.testing.assert_close(worth / MANY, expected.expand(2, -1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("prior", list(PriorType), ids=str)
def test_a_unit_takes_its_divergence_along(prior: PriorType) -> None:
    """Where the data have nothing to say, the evidence is what the prior charges, and its sum is the whole of that."""
    model = patch_model_(tiny_bert(), VDConfig(prior=prior))
    curvature = estimate_curvature(model, data())
    silent = replace(curvature, scores={path: 0 * scores for path, scores in curvature.scores.items()})
    fit_posterior_(model, curvature, num_data=1e4)
    found = unit_evidence(model, silent, num_data=1e4)
    layers = variational_layers(model).values()
    charged = sum(layer.prior.kl_bound(*layer.posterior, layer.group_axis)[0].item() for layer in layers)
    assert -sum(worth[0].sum().item() for worth in found.values()) == pytest.approx(charged, rel=1e-3)


@pytest.mark.parametrize("grouping", list(Grouping), ids=str)
@pytest.mark.parametrize("heads", [True, False], ids=["heads too", "neurons alone"])
def test_what_cannot_end_a_unit_is_infinite(grouping: Grouping, heads: bool) -> None:
    model = patch_model_(tiny_bert(), VDConfig(grouping=grouping, heads=heads))
    found = unit_evidence(model, estimate_curvature(model, data()), num_data=1e6)
    for path, relevance in unit_relevance(model).items():
        assert found[path].shape == relevance.shape
        assert torch.equal(found[path].isfinite(), relevance.isfinite())


@pytest.mark.parametrize("row", ["llama", "olmo2", "modernbert", "t5"])
def test_units_of_every_layout_have_a_worth(row: str) -> None:
    model = patch_model_(zoo_model(row))
    found = unit_evidence(model, estimate_curvature(model, [zoo_batch(model)]), num_data=MANY)
    for sublayer in find_sublayers(model):
        worth = found[sublayer.path]
        assert worth.shape == (2, sublayer.num_units)
        assert worth.amin(0).isfinite().all()
        assert worth.amin(0).amax() > 0


@pytest.mark.parametrize("width", [10, 12], ids=["another width", "the same width"])
def test_a_layer_of_a_chain_speaks_for_the_units_that_it_makes(width: int) -> None:
    """The middle one reads the first units, but its groups are the second ones."""
    chain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 2))
    model = patch_model_(chain)
    curvature = estimate_curvature(model, [{"input": torch.randn(20, 8)}], loss=squared_outputs)
    found = unit_evidence(model, curvature, num_data=MANY)
    makers = {part.path: part.sides[0].slices[0].module for part in find_sublayers(model)}
    readers = {part.path: part.out_side.slices[0].module for part in find_sublayers(model)}
    first, second = found
    assert readers[first] == makers[second]
    for path, speaker in {first: makers[first], second: readers[second]}.items():
        torch.testing.assert_close(found[path][0] / MANY, curvature.scales[speaker] / 2, rtol=1e-4, atol=1e-9)


def squared_outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).square().sum(1).mean()
