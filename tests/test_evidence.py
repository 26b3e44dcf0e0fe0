"""What units are worth together: against a loop over removals, and against what the loss really does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import rows, tiny_bert
from torch import Tensor, nn
from zoo import zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.curvature import estimate_curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.evidence import removal_costs, unit_evidence
from hf_vdneuron.laplace import fit_posterior_
from hf_vdneuron.layers import dense_layer
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.sublayers import Unit


#: So many examples that the prior has no say.
MANY = 1e12


def one_by_one(scores: Tensor, shrinkage: float) -> Tensor:
    """Remove the unit whose removal raises the quadratic loss least, again and again."""
    matrix = scores.double().t() @ scores.double() / len(scores)
    shrunk = (1 - shrinkage) * matrix + shrinkage * torch.diag(matrix.diagonal())
    num_units = len(matrix)
    gone = torch.zeros(num_units, dtype=torch.float64)
    costs = torch.zeros(num_units, dtype=torch.float64)
    highest = 0.0

    def loss(removed: Tensor) -> float:
        return (removed @ shrunk @ removed / 2).item()

    for _ in range(num_units):
        rises = {}
        for unit in (gone == 0).nonzero().flatten().tolist():
            more = gone.clone()
            more[unit] = 1
            rises[unit] = loss(more) - loss(gone)
        unit = min(rises, key=rises.get)
        gone[unit] = 1
        highest = max(highest, rises[unit])
        costs[unit] = highest
    return costs


@given(seed=st.integers(0, 2**16), num_units=st.integers(1, 12), shrinkage=st.sampled_from([0.0, 0.5, 1.0]))
def test_costs_are_those_of_a_loop(seed: int, num_units: int, shrinkage: float) -> None:
    scores = torch.randn(20, num_units, generator=torch.Generator().manual_seed(seed))
    found = removal_costs(scores, shrinkage=shrinkage)
    torch.testing.assert_close(found.double(), one_by_one(scores, shrinkage), rtol=1e-4, atol=1e-5)


def test_strangers_cost_what_each_does_alone() -> None:
    scores = torch.randn(30, 8)
    torch.testing.assert_close(
        removal_costs(scores, shrinkage=1.0).sort().values, (scores.square().mean(0) / 2).sort().values
    )


def test_of_two_that_say_the_same_the_second_costs_three_times_as_much() -> None:
    """Both gone, the loss has risen fourfold: by one, and by three."""
    scores = torch.randn(50, 1).expand(50, 2)
    alone = scores.square().mean() / 2
    torch.testing.assert_close(removal_costs(scores, shrinkage=0.0), torch.stack([alone, 3 * alone]))


def test_many_units_go_by_turns() -> None:
    scores = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    found, exact = removal_costs(scores), one_by_one(scores[:, :0], 0.5)
    assert exact.numel() == 0
    assert found.isfinite().all()
    # A turn of five hardly changes who goes early.
    alone = scores.square().mean(0) / 2
    assert (found >= alone.min()).all()
    assert torch.corrcoef(torch.stack([found, alone]))[0, 1] > 0.3


def data() -> list[dict[str, Tensor]]:
    columns = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    return [columns]


@torch.no_grad()
def with_twins() -> nn.Module:
    """A model whose second neuron says what its first does: half as much each as one would."""
    model = tiny_bert().eval()
    for sublayer in find_sublayers(model):
        if sublayer.unit is Unit.NEURON:
            (made,), (read,) = (side.slices for side in sublayer.sides)
            maker, reader = dense_layer(model, made.module), dense_layer(model, read.module)
            maker.weight[1], maker.bias[1] = maker.weight[0], maker.bias[0]
            reader.weight[:, :2] = 4 * reader.weight[:, :1]
    return model


def test_of_twins_one_is_worth_more() -> None:
    model = patch_model_(with_twins())
    curvature = estimate_curvature(model, data())
    for path, relevance in unit_evidence(model, curvature, num_data=MANY).items():
        if path.endswith("feed_forward"):
            first, second = sorted(relevance[0, :2].tolist())
            assert second > 1.5 * first
    alone = unit_relevance(model)
    for path, relevance in alone.items():
        if path.endswith("feed_forward"):
            assert relevance[1, 0] == pytest.approx(relevance[1, 1].item(), rel=1e-3)


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


@torch.no_grad()
def test_it_foretells_the_loss_better_than_each_unit_alone() -> None:
    """Of a model that is fitted to its data, so that the loss is near a minimum."""
    model = with_twins()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    (batch,) = data()
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()
    curvature = estimate_curvature(patch_model_(model.eval()), [batch])
    sublayers = [sublayer for sublayer in find_sublayers(model) if sublayer.unit is Unit.NEURON]

    def loss_without(num_gone: int, worths: dict[str, Tensor]) -> float:
        keep = {}
        for sublayer in sublayers:
            weakest = worths[sublayer.path].amin(0).argsort()[:num_gone]
            keep[sublayer.path] = torch.ones(2, sublayer.num_units, dtype=torch.bool)
            keep[sublayer.path][1, weakest] = False
        return mask_model_(model, RelevanceMask(keep))(**batch).loss.item()

    joint = unit_evidence(model, curvature, num_data=MANY)
    apart = {
        sublayer.path: curvature.scales[sublayer.out_side.slices[0].module].expand(2, -1) for sublayer in sublayers
    }
    rises = [sum(loss_without(gone, worths) for gone in (8, 12, 16)) for worths in (joint, apart)]
    assert rises[0] <= rises[1] + 1e-3
