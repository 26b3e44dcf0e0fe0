"""The KL and the prior of a whole model: what is summed, when the prior moves, and by what it is shared."""

import copy
import math

import pytest
import references
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.elbo import (
    em_step_,
    init_priors_,
    kl_divergence,
    num_weights,
    set_variational_,
    variational_layers,
)
from hf_vdneuron.functional import second_moment
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.priors import WeightPrior


prior_cases = pytest.mark.parametrize("prior", PriorType)
learned_prior_cases = pytest.mark.parametrize("prior", [PriorType.GROUP, PriorType.MIXTURE])
grouping_cases = pytest.mark.parametrize("grouping", Grouping)

Parameters = tuple[list[float], list[float]]


class TwiceUsed(nn.Module):
    """A chain whose output goes through it again: every layer runs twice in a forward."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, inputs: Tensor) -> Tensor:
        return self.chain(self.chain(inputs))


class Checkpointed(nn.Module):
    """A chain that forgets its activations and computes them again in the backward pass."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.chain, inputs, use_reentrant=False)


def chain(
    prior: PriorType = PriorType.MIXTURE, grouping: Grouping = Grouping.COUPLED, *, noise: bool = False
) -> nn.Sequential:
    """A patched chain in float64, its posterior moved away from its start; training collects the KL."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    patch_model_(model, VDConfig(prior=prior, grouping=grouping, initial_log_var=-5)).double()
    move_(model)
    init_priors_(model)
    set_variational_(model, noise=noise, collect_kl=True)
    return model.train()


@torch.no_grad()
def move_(model: nn.Module) -> None:
    """Change every weight, as an optimizer step does."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def batch() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def layers_of(model: nn.Module) -> list[VariationalLayer]:
    return list(variational_layers(model).values())


def priors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters of all priors."""
    return {name: values.clone() for name, values in model.named_buffers() if ".prior." in name}


def assert_priors_equal(model: nn.Module, expected: dict[str, Tensor], *, equal: bool = True) -> None:
    found = priors_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) is equal for name in found if "prior_scales" in name)


def members(model: nn.Module, key: str, group: int) -> list[float]:
    """W~^2 of all weights that share one prior, found layer by layer and feature by feature."""
    found: list[float] = []
    for layer in layers_of(model):
        moments = second_moment(layer.mean, layer.log_var).movedim(layer.group_axis, 0)
        for feature, its_group in enumerate(layer.prior.feature_group.tolist()):
            if layer.prior.key == key and its_group == group:
                found += moments[feature].flatten().tolist()
    return found


def parameters(layer: VariationalLayer, group: int) -> Parameters:
    return layer.prior.mixture_weights[:, group].tolist(), layer.prior.prior_scales[:, group].tolist()


def loop_bound(model: nn.Module) -> float:
    """The KL bound of a model, weight by weight."""
    total = 0.0
    for layer in layers_of(model):
        means, log_vars = (values.movedim(layer.group_axis, 0).tolist() for values in (layer.mean, layer.log_var))
        for group, posteriors in zip(
            layer.prior.feature_group.tolist(), zip(means, log_vars, strict=True), strict=True
        ):
            for m, v in zip(*posteriors, strict=True):
                alone = [1.0], [math.sqrt(m**2 + math.exp(v))]
                its_prior = alone if isinstance(layer.prior, WeightPrior) else parameters(layer, group)
                total += references.kl_bound(m, v, *its_prior)
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# The divergence


@prior_cases
@grouping_cases
def test_divergence_is_the_loop_over_all_weights(prior: PriorType, grouping: Grouping) -> None:
    model = chain(prior, grouping)
    model(batch())
    assert kl_divergence(model).item() == pytest.approx(loop_bound(model), rel=1e-12)


def test_divergence_is_taken_once() -> None:
    model = chain()
    model(batch())
    kl_divergence(model)
    with pytest.raises(RuntimeError, match=r"Layer `0` has no KL: call `set_variational_"):
        kl_divergence(model)
    model(batch())
    kl_divergence(model)


def test_layer_that_did_not_run_is_named() -> None:
    model = chain()
    model[:4](batch())
    with pytest.raises(RuntimeError, match="Layer `4` has no KL"):
        kl_divergence(model)


@pytest.mark.parametrize("mode", ["never_ran", "evaluation", "not_collecting"])
def test_divergence_needs_a_training_forward_that_collects(mode: str) -> None:
    model = chain()
    if mode != "never_ran":
        set_variational_(model, noise=True, collect_kl=mode == "evaluation")
        model.train(mode == "not_collecting")(batch())
    with pytest.raises(RuntimeError, match="Layer `0` has no KL"):
        kl_divergence(model)


def test_dense_model_has_no_divergence() -> None:
    with pytest.raises(RuntimeError, match="no variational layer: call `patch_model_` first"):
        kl_divergence(nn.Linear(2, 2))


@prior_cases
def test_layer_used_twice_counts_once(prior: PriorType) -> None:
    model = chain(prior)
    twice = TwiceUsed(copy.deepcopy(model))
    model(batch())
    twice(batch())
    kl_divergence(model).backward()
    twice_kl = kl_divergence(twice)
    assert twice_kl.item() == pytest.approx(loop_bound(model), rel=1e-12)
    twice_kl.backward()
    expected = {f"chain.{name}": gradient for name, gradient in gradients(model).items()}
    torch.testing.assert_close(gradients(twice), expected, rtol=0, atol=0)
    em_step_(model)
    em_step_(twice)
    assert_priors_equal(twice.chain, priors_of(model))


def test_weights_with_a_posterior_are_counted() -> None:
    model = chain(grouping=Grouping.SIDES)
    assert list(variational_layers(model)) == ["0", "2", "4"]
    assert num_weights(model) == 6 * 4 + 5 * 6 + 4 * 5
    assert num_weights(nn.Sequential(model, model[0])) == num_weights(model)
    assert num_weights(nn.Linear(2, 2)) == 0


def test_switching_forgets_what_was_collected() -> None:
    model = chain()
    model(batch())
    set_variational_(model, noise=True, collect_kl=False, frozen=True)
    for layer in layers_of(model):
        assert (layer.noise, layer.collect_kl, layer.frozen) == (True, False, True)
        assert layer.kl is layer.statistics is None


# The prior


@learned_prior_cases
@grouping_cases
def test_em_step_is_the_loop_over_all_weights_that_share_a_prior(prior: PriorType, grouping: Grouping) -> None:
    model = chain(prior, grouping)
    for _ in range(3):
        move_(model)
        model(batch())
        expected = [
            [
                references.em_step(members(model, layer.prior.key, group), *parameters(layer, group))
                for group in range(layer.prior.num_groups)
            ]
            for layer in layers_of(model)
        ]
        em_step_(model)
        for layer, its_groups in zip(layers_of(model), expected, strict=True):
            for group, (mixture_weights, scales) in enumerate(its_groups):
                found = parameters(layer, group)
                assert found[0] == pytest.approx(mixture_weights, rel=1e-10)
                assert found[1] == pytest.approx(scales, rel=1e-10)


@learned_prior_cases
def test_start_is_the_loop_over_all_weights_that_share_a_prior(prior: PriorType) -> None:
    factors = {PriorType.GROUP: [1.0], PriorType.MIXTURE: [2.0, 0.2]}[prior]
    model = chain(prior)
    for layer in layers_of(model):
        for group in range(layer.prior.num_groups):
            moments = members(model, layer.prior.key, group)
            mixture_weights, scales = parameters(layer, group)
            assert mixture_weights == [1 / len(factors)] * len(factors)
            mean = math.fsum(moments) / len(moments)
            assert scales == pytest.approx([math.sqrt(factor * mean) for factor in factors], rel=1e-12)


@learned_prior_cases
def test_layers_that_share_a_prior_hold_equal_copies(prior: PriorType) -> None:
    model = chain(prior)
    for _ in range(3):
        model(batch())
        em_step_(model)
        move_(model)
    first, second, third = (layer.prior for layer in layers_of(model))
    assert second.key == third.key != first.key
    assert torch.equal(second.prior_scales, third.prior_scales)
    assert torch.equal(second.mixture_weights, third.mixture_weights)


def test_statistics_move_the_prior_once() -> None:
    model = chain()
    start = priors_of(model)
    model(batch())
    em_step_(model)
    assert_priors_equal(model, start, equal=False)
    init_priors_(model)
    em_step_(model)
    assert_priors_equal(model, start)


@pytest.mark.parametrize("mode", ["evaluation", "not_collecting", "forward_alone", "no_forward"])
def test_prior_stands_still_without_a_full_training_step(mode: str) -> None:
    model = chain(grouping=Grouping.SIDES)
    start = priors_of(model)
    set_variational_(model, noise=True, collect_kl=mode != "not_collecting")
    model.train(mode != "evaluation")
    if mode != "no_forward":
        model(batch())
    if mode != "forward_alone":
        em_step_(model)
    assert_priors_equal(model, start)


def test_shared_prior_waits_for_all_its_layers() -> None:
    model = chain()
    start = priors_of(model)
    model[:3](batch())
    em_step_(model)
    found = priors_of(model)
    moved = {name for name in found if not torch.equal(found[name], start[name])}
    assert moved == {"0.prior.mixture_weights", "0.prior.prior_scales"}


@learned_prior_cases
def test_accumulation_moves_the_prior_like_one_batch(prior: PriorType) -> None:
    once = chain(prior, noise=True)
    every, last = copy.deepcopy(once), copy.deepcopy(once)
    once(batch())
    for _ in range(4):
        every(batch())
    set_variational_(last, noise=True, collect_kl=False)
    for _ in range(3):
        last(batch())
    set_variational_(last, noise=True, collect_kl=True)
    last(batch())
    for model in (once, every, last):
        em_step_(model)
    assert_priors_equal(every, priors_of(once))
    assert_priors_equal(last, priors_of(once))


# Under the ways in which PyTorch runs a model


@prior_cases
def test_checkpointing_changes_neither_divergence_nor_gradient_nor_prior(prior: PriorType) -> None:
    plain = chain(prior)
    wrapped, inputs = Checkpointed(copy.deepcopy(plain)), batch()
    losses = []
    for model in (plain, wrapped):
        nll = model(inputs).square().sum()
        losses.append(nll + kl_divergence(model))
        losses[-1].backward()
        em_step_(model)
    assert torch.equal(*losses)
    expected = {f"chain.{name}": gradient for name, gradient in gradients(plain).items()}
    torch.testing.assert_close(gradients(wrapped), expected, rtol=0, atol=0)
    assert_priors_equal(wrapped.chain, priors_of(plain))


# Dynamo itself does what this warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("prior", [PriorType.MIXTURE, PriorType.WEIGHT])
def test_compilation_changes_neither_divergence_nor_gradient_nor_prior(prior: PriorType) -> None:
    plain, inputs = chain(prior), batch()
    compiled_model = copy.deepcopy(plain)
    losses = []
    for model, forward in (
        (plain, plain),
        (compiled_model, torch.compile(compiled_model, fullgraph=True, backend="aot_eager")),
    ):
        nll = forward(inputs).square().sum()
        losses.append(nll + kl_divergence(model))
        losses[-1].backward()
        em_step_(model)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(gradients(compiled_model), gradients(plain))
    for name, values in priors_of(plain).items():
        torch.testing.assert_close(priors_of(compiled_model)[name], values)
